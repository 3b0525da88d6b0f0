"""Tiny models of the image-text-to-text families, second part (emu3 to glmga)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.families.kinds_a import (
    GEMMA_TEXT,
    GEMMA_TOWER,
    IMAGE,
    MROPE,
    PACKED_TOWER,
    SIGLIP,
    TEXT,
    TOWER,
    VIDEO,
    VOCAB,
    make,
    packed,
    picture,
    positions,
    prompt,
    seen,
)
from tests.families.tiny import Impossible, Tiny

TIMM = {  # a network of timm's own tests; its 256 channels cannot be made fewer
    "architecture": "test_efficientnet_ln",
    "do_pooling": False,
    "hidden_size": 256,
    "model_args": {"in_chans": 3},
}


def emu3() -> Tiny:
    codes = {f"<|visual token {number:06d}|>": 100 + number for number in range(32)}
    config = make(
        "emu3",
        text_config={**TEXT, "attention_dropout": 0.0},
        vq_config={
            "codebook_size": 32,
            "embed_dim": 4,
            "latent_channels": 4,
            "temporal_downsample_factor": 2,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [3],
            "hidden_size": 32,
        },
        vocabulary_map={**codes, "<image>": IMAGE, "<|extra_200|>": 140},
    )
    return Tiny(config, {**seen(20), "image_sizes": torch.tensor([[32, 32]] * 2)})  # 4 rows of 4 and a line end


def ernie4_5_vl_moe() -> Tiny:
    config = make(
        "ernie4_5_vl_moe",
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "moe_intermediate_size": [32, 16],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
        },
        vision_config=PACKED_TOWER,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=152,
        image_end_token_id=153,
        video_start_token_id=154,
        video_end_token_id=155,
    )
    inputs = packed(3 * 8 * 8)
    return Tiny(config, {**inputs, "moe_mm_token_type_ids": inputs["mm_token_type_ids"]})


def evolla() -> Tiny:
    protein = {**TEXT, "vocab_size": 40, "mask_token_id": 4, "hidden_size": 32, "num_attention_heads": 2}
    config = make(
        "evolla",
        **TEXT,
        protein_encoder_config=protein,
        aligner_num_add_layers=1,
        resampler_depth=2,
        resampler_dim_head=16,
        resampler_heads=2,
        resampler_num_latents=4,
    )
    protein_ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(3))
    masks = {"protein_input_ids": protein_ids, "protein_attention_mask": torch.ones_like(protein_ids)}
    return Tiny(config, {**prompt(0), **masks}, note="sees proteins (protein_input_ids), no pictures")


def exaone4_5() -> Tiny:
    text = {"model_type": "exaone4", **TEXT, "layer_types": ["sliding_attention", "full_attention"]}
    config = make(
        "exaone4_5",
        text_config={**text, "sliding_window": 8},
        vision_config={**PACKED_TOWER, "num_key_value_heads": 1, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(config, packed(types=False))


def fast_vlm() -> Tiny:
    text, vision = {"model_type": "qwen2", **TEXT}, {"model_type": "timm_wrapper", **TIMM}
    return Tiny(make("fast_vlm", text_config=text, vision_config=vision, image_token_index=IMAGE), seen(4, side=64))


def florence2() -> Tiny:
    bart = {
        "vocab_size": VOCAB,
        "d_model": 64,
        "max_position_embeddings": 64,
        **{f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in BART.items()},
    }
    config = make(
        "florence2",
        text_config={"model_type": "bart", **bart},
        vision_config={
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [1, 1, 2, 2],
            "num_groups": [1, 1, 2, 2],
            "window_size": 2,
            "projection_dim": 64,
        },
        image_token_id=IMAGE,
    )
    return Tiny(config, {**seen(5, side=64), "decoder_input_ids": torch.tensor([[2, 20, 30], [2, 40, 50]])})


BART = {"layers": 2, "ffn_dim": 96, "attention_heads": 4}


def fuyu() -> Tiny:
    text = {"model_type": "persimmon", **TEXT}
    config = make("fuyu", text_config=text, patch_size=8, image_size=32, image_token_id=IMAGE)
    return Tiny(config, {**prompt(16), "pixel_values": picture(2, 16, 3 * 8 * 8)}, note="no tower: patches go in")


def gemma3() -> Tiny:
    config = make(
        "gemma3",
        text_config={**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=152,
        eoi_token_index=153,
    )
    inputs = seen(4)
    return Tiny(config, {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()})


def gemma3n() -> Tiny:
    config = make(
        "gemma3n",
        text_config={
            **GEMMA_TEXT,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "vocab_size_per_layer_input": 140,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "laurel_rank": 16,
        },
        vision_config={**TIMM, "vocab_size": 12, "vocab_offset": 140},
        audio_config={
            "vocab_size": 8,
            "vocab_offset": 152,
            "input_feat_size": 16,
            "hidden_size": 32,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": [16, 16],
        },
        vision_soft_tokens_per_image=4,
        image_token_id=IMAGE,
        audio_token_id=156,
        boi_token_id=130,
        eoi_token_id=149,
        boa_token_id=131,
        eoa_token_id=157,
    )
    return Tiny(config, seen(4, side=64), note="test_efficientnet_ln in place of MobileNet v5")


GEMMA4_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": 152,
    "eoi_token_id": 153,
    "audio_token_id": 154,
    "boa_token_id": 155,
    "eoa_token_index": 156,
}


def gemma4() -> Tiny:
    config = make(
        "gemma4",
        text_config={
            **GEMMA_TEXT,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        vision_config=GEMMA_TOWER,
        audio_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 16],
            "output_proj_dims": 32,
        },
        **GEMMA4_TOKENS,
    )
    inputs = {**prompt(4), "pixel_values": picture(2, 16, 192), "image_position_ids": positions(4)}
    return Tiny(config, {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()})


def gemma4_unified() -> Tiny:
    config = make(
        "gemma4_unified",
        text_config=GEMMA_TEXT,
        vision_config={
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 64,
            "mm_posemb_size": 16,
            "output_proj_dims": 64,
        },
        audio_config={"audio_embed_dim": 32},
        **GEMMA4_TOKENS,
    )
    inputs = {**prompt(4), "pixel_values": picture(2, 4, 3 * 16 * 16), "image_position_ids": positions(2)}
    return Tiny(config, {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()})


def git() -> Tiny:
    config = make("git", **TEXT, vision_config=TOWER)
    return Tiny(config, {**prompt(0), "pixel_values": picture(2, 3, 32, 32)})


GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 152,
    "image_end_token_id": 153,
    "video_start_token_id": 154,
    "video_end_token_id": 155,
}
GLM_TOWER = {**PACKED_TOWER, "image_size": 32}


def glm4v(model_type: str = "glm4v") -> Tiny:
    text = {**TEXT, "rope_parameters": MROPE}
    return Tiny(make(model_type, text_config=text, vision_config=GLM_TOWER, **GLM_TOKENS), packed())


def glm4v_moe() -> Tiny:
    config = make(
        "glm4v_moe",
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
        },
        vision_config=GLM_TOWER,
        **GLM_TOKENS,
    )
    return Tiny(config, packed())


def glm5_next() -> Tiny:
    config = make(
        "glm5_next",
        text_config={
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "indexed_attention"] * 2,
            "indexer_types": ["full"] * 4,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_kpool": 2,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "hc_mult": 2,
        },
        vision_config={**GLM_TOWER, "projection_intermediate_size": 64},
        **GLM_TOKENS,
    )
    return Tiny(config, packed())


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    "emu3": emu3,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "evolla": evolla,
    "exaone4_5": exaone4_5,
    "fast_vlm": fast_vlm,
    "florence2": florence2,
    "fuyu": fuyu,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "git": git,
    "glm46v": lambda: glm4v("glm46v"),
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "glm5_next": glm5_next,
    "glm_ocr": lambda: glm4v("glm_ocr"),
    "glmga": lambda: glm4v("glmga"),
}
