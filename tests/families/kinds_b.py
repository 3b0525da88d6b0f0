"""Tiny members of the families lfm2_vl ... minicpmv4_7: small config, two rows of inputs with a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig

from tests.families.tiny import Impossible, Tiny, pixels, tokens

IMAGE, VIDEO, START, STOP = 200, 201, 202, 203
"""Ids of the placeholders inside the vocabulary of 320."""
TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**TOWER, "image_size": 32, "patch_size": 8}
"""A tower that sees 32 x 32 pixels as 4 x 4 patches."""
CLIP = {"model_type": "clip_vision_model", **SQUARE}
SIGLIP = {"model_type": "siglip_vision_model", **SQUARE, "vision_use_head": False}
PIXTRAL = {"model_type": "pixtral", **SQUARE, "head_dim": 16}
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": STOP,
}
PIXELS = (2, 3, 32, 32)
LOUD = {"initializer_range": 0.1}
"""For towers whose random features would be lost beside the words."""


def config(kind: str, **values: Any) -> Any:
    return AutoConfig.for_model(kind, **values)


def patches(width: int, *, side: int = 4) -> dict[str, torch.Tensor]:
    """Flat patches of two pictures of side x side patches, as Qwen's processors lay them out."""
    grid = torch.tensor([[1, side, side]] * 2)
    return {"pixel_values": pixels(2 * side * side, width), "image_grid_thw": grid}


def typed(small: Any, count: int) -> dict[str, torch.Tensor]:
    """Ids, and which of them are picture (1) or text (0)."""
    rows = tokens(small, count)
    return {"input_ids": rows, "mm_token_type_ids": (rows == IMAGE).long()}


def lfm2_vl() -> Tiny:
    layers = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "full_attention"]}
    small = config(
        "lfm2_vl",
        text_config={"model_type": "lfm2", **TEXT, **layers, "block_multiple_of": 16},
        vision_config={"model_type": "siglip2_vision_model", **TOWER, "patch_size": 4, "num_patches": 16}
        | {"vision_use_head": False},
        projector_hidden_size=64,
        image_token_id=IMAGE,
    )
    picture = {
        "pixel_values": pixels(2, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    }
    return Tiny(small, {"input_ids": tokens(small, 4), **picture})


def lfm3_vl() -> Tiny:
    kinds = ["conv", "conv", "full_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 6, "layer_types": [*kinds, "sliding_attention", "sliding_attention"]}
    tower = {**TOWER, "num_hidden_layers": 4, "num_key_value_heads": 1, "patch_size": 4, "layer_types": kinds}
    small = config(
        "lfm3_vl",
        text_config={"model_type": "lfm3", **text, "sliding_window": 8},
        vision_config=tower,
        projector_hidden_size=64,
        **SPECIAL,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), **patches(96)})


def lighton_ocr() -> Tiny:
    small = config(
        "lighton_ocr", text_config={"model_type": "qwen3", **TEXT}, vision_config=PIXTRAL, image_token_id=IMAGE
    )
    return Tiny(small, sized(small, 4))


def llama4() -> Tiny:
    text = {**TEXT, "num_hidden_layers": 4, "intermediate_size": 48, "intermediate_size_mlp": 96}
    experts = {"num_local_experts": 4, "moe_layers": [1, 3], "no_rope_layers": [1, 1, 0, 0], "attention_chunk_size": 16}
    ends = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    small = config(
        "llama4",
        text_config={**text, **experts},
        vision_config={**SQUARE, "intermediate_size": 128, **ends},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=STOP,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS)})


def llava() -> Tiny:
    small = config("llava", text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, image_seq_length=16)
    return Tiny(small, {"input_ids": tokens(small, 16), "pixel_values": pixels(*PIXELS)})


def vipllava() -> Tiny:
    small = config(
        "vipllava", text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layer=[-1, -2]
    )
    return Tiny(small, {"input_ids": tokens(small, 16), "pixel_values": pixels(*PIXELS)})


def video_llava() -> Tiny:
    small = config(
        "video_llava", text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, video_token_index=VIDEO
    )
    return Tiny(small, {"input_ids": tokens(small, 16), "pixel_values_images": pixels(*PIXELS)})


def llava_next() -> Tiny:
    return _anyres("llava_next", text_config=LLAMA, vision_config=CLIP)


def llava_next_video() -> Tiny:
    return _anyres("llava_next_video", text_config=LLAMA, vision_config=CLIP, video_token_index=VIDEO)


def llava_onevision() -> Tiny:
    return _anyres("llava_onevision", text_config=QWEN2, vision_config=SIGLIP, video_token_index=VIDEO)


def _anyres(kind: str, **values: Any) -> Tiny:
    """One tile and the whole picture: 16 tokens, then 4 rows of 4 tokens and a newline."""
    small = config(kind, image_token_index=IMAGE, image_grid_pinpoints=[[32, 32]], **values)
    return Tiny(small, {**sized(small, 36), "pixel_values": pixels(2, 2, 3, 32, 32)})


def sized(small: Any, count: int) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([[32, 32], [32, 32]])
    return {"input_ids": tokens(small, count), "pixel_values": pixels(*PIXELS), "image_sizes": sizes}


QWEN3_5 = {
    **TEXT,
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [4, 2, 2],
    },
}


def _minicpm(kind: str, side: int) -> Tiny:
    tower = {**SQUARE, "num_hidden_layers": 4, "patch_size": 4}
    small = config(
        kind,
        text_config=QWEN3_5,
        vision_config=tower,
        insert_layer_id=1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    picture = {"pixel_values": pixels(1, 3, 4, 2 * side * side * 4), "target_sizes": torch.tensor([[side, side]] * 2)}
    rows = typed(small, 4) if kind == "minicpmv4_7" else {"input_ids": tokens(small, 4)}
    return Tiny(small, {**rows, **picture})


def minicpm_ocr() -> Tiny:
    return _minicpm("minicpm_ocr", 4)


def minicpmv4_6() -> Tiny:
    return _minicpm("minicpmv4_6", 8)


def minicpmv4_7() -> Tiny:
    return _minicpm("minicpmv4_7", 8)


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    make.__name__: make
    for make in (
        lfm2_vl,
        lfm3_vl,
        lighton_ocr,
        llama4,
        llava,
        llava_next,
        llava_next_video,
        llava_onevision,
        minicpm_ocr,
        minicpmv4_6,
        minicpmv4_7,
        video_llava,
        vipllava,
    )
}
