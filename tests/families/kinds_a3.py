"""Tiny models of the image-text-to-text families, third part (got_ocr2 to kosmos-2.5)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.families.kinds_a import (
    IMAGE,
    MROPE,
    OPT,
    PACKED_TOWER,
    QFORMER,
    SAM,
    TEXT,
    TOWER,
    VIDEO,
    VOCAB,
    make,
    packed,
    picture,
    prompt,
    seen,
)
from tests.families.tiny import Impossible, Tiny

MOE = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}


def got_ocr2() -> Tiny:
    text = {"model_type": "qwen2", **TEXT}
    config = make("got_ocr2", text_config=text, vision_config=SAM, image_token_index=IMAGE, image_seq_length=4)
    return Tiny(config, seen(4, side=64))


def granite4_vision() -> Tiny:
    config = make(
        "granite4_vision",
        text_config={**TEXT, "num_hidden_layers": 5},
        vision_config={"model_type": "clip_vision_model", **TOWER, "hidden_size": 64},  # 64 a head of the Q-Former
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 48}
        | {"cross_attention_frequency": 1, "vocab_size": VOCAB, "max_position_embeddings": 64},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0]],
        spatial_target_layers=[1, 2, 3, 4],
    )
    tiles = {"pixel_values": picture(2, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}
    return Tiny(config, {**prompt(10), **tiles})  # whole picture 2 x 2, one tile 2 x 2 and two line ends


def granite_docling() -> Tiny:
    config = make(
        "granite_docling",
        text_config=TEXT,
        vision_config={**TOWER, "out_hidden_size": 64, "scale_factor": 2, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        density_router_hidden_size=16,
    )
    tiles = {"pixel_values": picture(2, 1, 3, 32, 32), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    return Tiny(config, {**prompt(4), **tiles})


def hunyuan_vl() -> Tiny:
    config = make(
        "hunyuan_vl",
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_section": [2, 2, 2, 2]}},
        vision_config={
            **TOWER,
            "max_image_size": 32,
            "min_image_size": 32,
            "text_hidden_size": 64,
            "out_hidden_size": 64,
        },
        image_token_id=IMAGE,
        im_start_id=152,
        im_end_id=153,
        im_newline_id=154,
    )
    inputs = {**packed(3 * 8 * 8), **prompt(8)}  # 2 rows of 2 and a line end, between a start and an end
    return Tiny(config, {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()})


def hyperclovax_vision_v2() -> Tiny:
    config = make(
        "hyperclovax_vision_v2",
        text_config={"model_type": "hyperclovax", **TEXT, "attention_multiplier": 0.25},
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            **PACKED_TOWER,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(config, packed(types=False))


def idefics() -> Tiny:
    config = make(
        "idefics",
        **{key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")},
        additional_vocab_size=16,
        alpha_initializer="ones",
        use_resampler=True,
        qk_layer_norms=True,
        vision_config={**TOWER, "embed_dim": 32},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 16,
            "qk_layer_norms_perceiver": True,
        },
    )
    inputs = {**prompt(0), "pixel_values": picture(2, 1, 3, 32, 32)}
    return Tiny(config, {**inputs, "image_attention_mask": torch.ones(2, inputs["input_ids"].shape[1], 1).long()})


def idefics2() -> Tiny:
    config = make(
        "idefics2",
        text_config={"model_type": "mistral", **TEXT, "sliding_window": 8},
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )
    return Tiny(config, tiles())


def tiles() -> dict[str, torch.Tensor]:
    """Prompt of 4 image tokens with one tile a row, none of it padding."""
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    return {**prompt(4), "pixel_values": picture(2, 1, 3, 32, 32), "pixel_attention_mask": mask}


def idefics3() -> Tiny:
    text, vision = {"model_type": "llama", **TEXT}, {"model_type": "idefics3_vision", **TOWER}
    return Tiny(make("idefics3", text_config=text, vision_config=vision, scale_factor=2, image_token_id=IMAGE), tiles())


INKLING_TEXT = {
    **TEXT,
    **MOE,
    "num_hidden_layers": 4,
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 16,
    "rel_extent": 16,
    "unpadded_vocab_size": VOCAB,
}


def inkling2() -> Tiny:
    config = make(
        "inkling2",
        text_config={**INKLING_TEXT, "intermediate_size": 32, "n_layers_per_attn_res_block": 2},
        vision_config={**TOWER, "posemb_grid_size": 4, "projection_hidden_dim": 48, "text_hidden_size": 64},
        image_token_id=IMAGE,
    )
    inputs = {**prompt(4), "pixel_values": picture(8, 16, 16, 3)}  # a square of 2 x 2 patches for each token
    return Tiny(config, {**inputs, "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)})


def inkling_mm_model() -> Tiny:
    config = make(
        "inkling_mm_model",
        text_config={
            **INKLING_TEXT,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "n_shared_experts": 1,
            "logits_mup_width_multiplier": 1.0,
        },
        vision_config={"patch_size": 4, "num_hidden_layers": 3, "hidden_size": 64, "text_hidden_size": 64},
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": 64},
        image_token_id=IMAGE,
        audio_token_id=154,
        image_bos_token_id=152,
        audio_bos_token_id=153,
    )
    return Tiny(config, {**prompt(4), "pixel_values": picture(8, 2, 4, 4, 3)})


def instructblip(model_type: str = "instructblip") -> Tiny:
    video = model_type == "instructblipvideo"
    config = make(
        model_type,
        text_config=OPT,
        qformer_config=QFORMER,
        vision_config=TOWER,
        num_query_tokens=4,
        image_text_hidden_size=16,
        **{"video_token_index" if video else "image_token_index": IMAGE},
    )
    question = {"qformer_input_ids": prompt(0)["input_ids"]}
    if video:
        return Tiny(config, {**prompt(8), **question, "pixel_values": picture(2, 2, 3, 32, 32)})
    return Tiny(config, {**seen(4), **question})


def internvl() -> Tiny:
    config = make(
        "internvl",
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Tiny(config, seen(4))


def janus() -> Tiny:
    config = make(
        "janus",
        text_config={"model_type": "llama", **TEXT},
        vision_config={**TOWER, "mlp_ratio": 2.0, "projection_dim": 64, "num_image_tokens": 16},
        vq_config={
            "embed_dim": 16,
            "num_embeddings": 32,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=IMAGE,
    )
    return Tiny(config, seen(16))


def kimi_k25() -> Tiny:
    config = make(
        "kimi_k25",
        text_config={
            "model_type": "deepseek_v3",
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            **MOE,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        vision_config={**TOWER, "pos_emb_height": 4, "pos_emb_width": 4},
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=152,
        vision_end_token_id=153,
    )
    return Tiny(config, {**packed(types=False), "pixel_values": picture(32, 3, 8, 8)})


KOSMOS_TEXT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "embed_dim": 64,
    "layers": 2,
    "ffn_dim": 96,
    "attention_heads": 4,
}


def latents() -> dict[str, torch.Tensor]:
    """Prompt whose first tokens after the start give way to the 4 latent queries of the picture."""
    inputs = prompt(4)
    mask = (inputs["input_ids"] == IMAGE).long()
    return {**inputs, "image_embeds_position_mask": mask}


def kosmos_2() -> Tiny:
    config = make("kosmos-2", text_config=KOSMOS_TEXT, vision_config=TOWER, latent_query_num=4)
    return Tiny(config, {**latents(), "pixel_values": picture(2, 3, 32, 32)})


def kosmos_2_5() -> Tiny:
    config = make(
        "kosmos-2.5",
        text_config=KOSMOS_TEXT,
        vision_config={**TOWER, "patch_embed_hidden_size": 192, "head_dim": 16, "max_num_patches": 16},
        latent_query_num=4,
    )
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).expand(2, -1, -1)
    patches = torch.cat([grid, picture(2, 16, 192)], dim=-1)
    return Tiny(config, {**latents(), "flattened_patches": patches}, note="row and column go before each patch")


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    "got_ocr2": got_ocr2,
    "granite4_vision": granite4_vision,
    "granite_docling": granite_docling,
    "hunyuan_vl": hunyuan_vl,
    "hyperclovax_vision_v2": hyperclovax_vision_v2,
    "idefics": idefics,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "inkling2": inkling2,
    "inkling_mm_model": inkling_mm_model,
    "instructblip": instructblip,
    "instructblipvideo": lambda: instructblip("instructblipvideo"),
    "internvl": internvl,
    "janus": janus,
    "kimi_k25": kimi_k25,
    "kosmos-2": kosmos_2,
    "kosmos-2.5": kosmos_2_5,
}
