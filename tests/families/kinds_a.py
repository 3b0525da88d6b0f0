"""Tiny models of the image-text-to-text families, first part (aria to fuyu): one small function each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.families.tiny import Impossible, Tiny

VOCAB, IMAGE, VIDEO = 160, 150, 151
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.02,  # BLIP and SAM have 1e-10: a new tower says the same of every picture
}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
PACKED_TOWER = {  # towers of the Qwen kind: patches of all pictures in one row, 2 x 2 of them become one token
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 64,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
SAM = {
    **TOWER,
    "output_channels": 16,
    "image_size": 64,
    "mlp_dim": 48,
    "window_size": 2,
    "global_attn_indexes": [1],
}


def make(model_type: str, **values: Any) -> PreTrainedConfig:
    """Config of a type from (nested) values; the caller's tables stay as they are."""
    return CONFIG_MAPPING[model_type](**copy.deepcopy(values))


def picture(*shape: int) -> torch.Tensor:
    """Pixels (or flat patches) as a processor gives them: roughly normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def prompt(tokens: int, image: int | None = IMAGE, *, text: int = 6) -> dict[str, torch.Tensor]:
    """Two rows of: start token, `tokens` placeholders, `text` tokens of text."""
    words = torch.randint(10, 100, (2, text), generator=torch.Generator().manual_seed(2))
    start = torch.ones(2, 1, dtype=torch.long)
    ids = torch.cat([start, torch.full((2, tokens), image if image is not None else 3), words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seen(tokens: int, *, side: int = 32, image: int = IMAGE) -> dict[str, torch.Tensor]:
    """Prompt with one picture of side x side pixels a row."""
    return {**prompt(tokens, image), "pixel_values": picture(2, 3, side, side)}


def packed(width: int = 3 * 2 * 8 * 8, *, types: bool = True, image: int = IMAGE) -> dict[str, torch.Tensor]:
    """Prompt with one picture of 4 x 4 flat patches a row, which become 4 tokens."""
    inputs = prompt(4, image)
    if types:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).long()
    return {**inputs, "pixel_values": picture(32, width), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def aria() -> Tiny:
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32}
    config = make(
        "aria",
        text_config={"model_type": "aria_text", **text},
        vision_config={"model_type": "idefics3_vision", **TOWER},
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )
    return Tiny(config, {**seen(4), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.bool)})


def aya_vision() -> Tiny:
    text = {"model_type": "cohere2", **TEXT, "layer_types": ["sliding_attention", "full_attention"]}
    config = make(
        "aya_vision", text_config={**text, "sliding_window": 8}, vision_config=SIGLIP, image_token_index=IMAGE
    )
    return Tiny(config, seen(4))


def blip() -> Tiny:
    vision = {**TOWER, "projection_dim": 16}
    config = make(
        "blip",
        text_config={**TEXT, "encoder_hidden_size": 32, "projection_dim": 16, "sep_token_id": 2, "bos_token_id": 1},
        vision_config=vision,
        projection_dim=16,
        image_text_hidden_size=16,
    )
    return Tiny(config, {**prompt(0), "pixel_values": picture(2, 3, 32, 32)})


OPT = {"model_type": "opt", **TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64}
QFORMER = {**TEXT, "hidden_size": 32, "num_attention_heads": 2, "encoder_hidden_size": 32}


def blip_2() -> Tiny:
    config = make(
        "blip-2",
        text_config=OPT,
        qformer_config=QFORMER,
        vision_config=TOWER,
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=IMAGE,
    )
    return Tiny(config, seen(4))


def chameleon() -> Tiny:
    codes = {"IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(n)) + "Z": 100 + n for n in range(32)}
    config = make(
        "chameleon",
        **TEXT,
        vq_config={
            "embed_dim": 16,
            "num_embeddings": 32,
            "latent_channels": 16,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        vocabulary_map={**codes, "<image>": IMAGE},
    )
    inputs = seen(16)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    # The logits of picture tokens are the lowest float32: next to it nothing else counts, so the loss is compared.
    return Tiny(config, inputs, output="loss", note="loss compared: logits of picture tokens are -3e38")


def cohere2_vision() -> Tiny:
    text = {"model_type": "cohere2", **TEXT, "layer_types": ["sliding_attention", "full_attention"]}
    config = make(
        "cohere2_vision",
        text_config={**text, "sliding_window": 8},
        vision_config=SIGLIP,
        alignment_intermediate_size=64,
        image_token_id=IMAGE,
    )
    return Tiny(config, seen(4))


def cohere_compass() -> Tiny:
    config = make(
        "cohere_compass",
        text_config={
            **TEXT,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
        },
        vision_config={**PACKED_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(config, packed())


def cosmos3_edge() -> Tiny:
    config = make(
        "cosmos3_edge",
        text_config={**TEXT, "rope_parameters": MROPE},
        vision_config={**TOWER, "num_patches": 16},
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(config, packed(3 * 8 * 8))


def cosmos3_omni() -> Tiny:
    config = make(
        "cosmos3_omni",
        text_config={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision_config={**PACKED_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(config, packed())


def deepseek_ocr2() -> Tiny:
    moe = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = make(
        "deepseek_ocr2",
        text_config={**TEXT, **moe, "mlp_layer_types": ["dense", "sparse"]},
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**TEXT, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        },
        image_token_id=IMAGE,
    )
    return Tiny(config, seen(145, side=64))


def deepseek_vl() -> Tiny:
    text = {"model_type": "llama", **TEXT}
    return Tiny(make("deepseek_vl", text_config=text, vision_config=SIGLIP, image_token_id=IMAGE), seen(16))


def deepseek_vl_hybrid() -> Tiny:
    config = make(
        "deepseek_vl_hybrid",
        text_config={"model_type": "llama", **TEXT},
        vision_config=SIGLIP,
        high_res_vision_config={"model_type": "sam_vision_model", **SAM},
        image_token_id=IMAGE,
    )
    return Tiny(config, {**seen(16), "high_res_pixel_values": picture(2, 3, 64, 64)})


GEMMA_TEXT = {
    **TEXT,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 32,
}
GEMMA_TOWER = {
    "model_type": "gemma4_vision",
    **TOWER,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}


def positions(side: int) -> torch.Tensor:
    """(2, side * side, 2) with the column and row of every patch."""
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(-1, 2)
    return grid.expand(2, -1, -1).clone()


def diffusion_gemma() -> Tiny:
    config = make(
        "diffusion_gemma",
        text_config={**GEMMA_TEXT, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        vision_config=GEMMA_TOWER,
        image_token_id=IMAGE,
        boi_token_id=152,
        eoi_token_id=153,
        canvas_length=8,
    )
    inputs = {**prompt(4), "pixel_values": picture(2, 16, 192), "image_position_ids": positions(4)}
    return Tiny(config, {**inputs, "decoder_input_ids": torch.arange(20, 36).reshape(2, 8)})


def dots3_note() -> Tiny:
    mla = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    swa = {f"swa_{key}": value for key, value in mla.items()}
    config = make(
        "dots3_note",
        text_config={
            **TEXT,
            **mla,
            **swa,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 32,
            "num_hidden_layers": 4,
            "layer_types": ["indexed_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            "sliding_window": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_experts_intermediate_size": 32,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
        vision_config={
            **TOWER,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "feature_size": 16,
            "downsample_hidden_size": 16,
            "adapter_input_size": 32,
            "adapter_out_dim": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=154,
    )
    return Tiny(config, packed(3 * 8 * 8, types=False))


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    "aria": aria,
    "aya_vision": aya_vision,
    "blip": blip,
    "blip-2": blip_2,
    "chameleon": chameleon,
    "cohere2_vision": cohere2_vision,
    "cohere_compass": cohere_compass,
    "cosmos3_edge": cosmos3_edge,
    "cosmos3_omni": cosmos3_omni,
    "deepseek_ocr2": deepseek_ocr2,
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "diffusion_gemma": diffusion_gemma,
    "dots3_note": dots3_note,
}
