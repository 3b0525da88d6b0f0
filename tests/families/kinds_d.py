"""Tiny models of the families that came with transformers 5.24, and of one that it broke."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.families.kinds_a import IMAGE, TEXT, TOWER, VIDEO, make, packed, picture, prompt
from tests.families.kinds_a3 import INKLING_TEXT
from tests.families.kinds_b import llama4 as tiny_llama4
from tests.families.tiny import Impossible, Tiny, pixels


def apertus1p5() -> Tiny:
    """Pictures become codes, and the codes tokens of the text's own table: no gradient and no width passes there."""
    config = make(
        "apertus1p5",
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        vision_config={
            "codebook_size": 16,
            "embed_dim": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [8],
            "resolution": 32,
        },
        audio_config={
            "model_type": "wavtokenizer_encoder",
            "codebook_size": 8,
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
        },
        image_token_id=IMAGE,
        audio_token_id=IMAGE + 1,
        image_token_offset=120,
        audio_token_offset=136,
    )
    return Tiny(
        config, {**prompt(64), "pixel_values": pixels(2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}
    )


def hy_v4_vl() -> Tiny:
    config = make(
        "hy_v4_vl",
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "index_topk": 64,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "hc_mult": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            **{k: v for k, v in TOWER.items() if k != "image_size"},
            "max_image_size": 32,
            "out_hidden_size": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    inputs = {**packed(3 * 8 * 8), **prompt(6)}  # 2 rows of 2 and a line end
    return Tiny(config, {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()})


def inkling2_loop() -> Tiny:
    """The middle layers are passed through more than once."""
    text = {key: value for key, value in INKLING_TEXT.items() if key not in ("num_hidden_layers", "layer_types")}
    config = make(
        "inkling2_loop",
        text_config={
            **text,
            "num_hidden_layers": 6,
            "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            "n_layers_per_attn_res_block": 2,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_num_passes": 2,
            "loop_gate_rank": 8,
        },
        vision_config={
            "model_type": "inkling2_vision",
            **TOWER,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 48,
            "text_hidden_size": 64,
        },
        image_token_id=IMAGE,
    )
    inputs = {**prompt(4), "pixel_values": picture(8, 16, 16, 3)}  # a square of 2 x 2 patches for each token
    return Tiny(config, {**inputs, "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)})


def omniasr() -> Tiny:
    config = make(
        "omniasr",
        text_config={"model_type": "llama", **TEXT},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "conv_dim": [16, 16],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
            "layerdrop": 0.0,
        },
        audio_token_id=IMAGE,
    )
    samples = 10 + 5 * (3 + 2 * 5 - 1)  # six frames behind both convolutions
    return Tiny(config, {**prompt(6), "input_values": pixels(2, 1, samples)})


def llama4() -> Tiny | Impossible:
    """transformers 5.24 asks the language model's output for a field that only a multimodal one has."""
    tiny = tiny_llama4()
    try:
        with torch.no_grad():
            AutoModelForImageTextToText.from_config(tiny.config)(**tiny.inputs)
    except AttributeError as error:
        return Impossible(f"Llama4ForConditionalGeneration.forward fails upstream: {error}")
    return tiny


_NEW: dict[str, Callable[[], Tiny | Impossible]] = {
    "apertus1p5": apertus1p5,
    "hy_v4_vl": hy_v4_vl,
    "inkling2_loop": inkling2_loop,
    "omniasr": omniasr,
}
KINDS = {name: tiny for name, tiny in _NEW.items() if name in CONFIG_MAPPING} | {"llama4": llama4}
"""Older transformers do not know the new families."""
