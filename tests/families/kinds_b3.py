"""Tiny members of the families minimax_m3_vl ... pi0: small config, two rows of inputs with a picture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.families.kinds_b import (
    IMAGE,
    LLAMA,
    LOUD,
    MOE,
    PIXELS,
    PIXTRAL,
    QWEN2,
    SIGLIP,
    SPECIAL,
    SQUARE,
    START,
    STOP,
    TEXT,
    TOWER,
    VIDEO,
    config,
    patches,
    sized,
    typed,
)
from tests.families.tiny import Impossible, Tiny, pixels, tokens


def minimax_m3_vl() -> Tiny:
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    }
    small = config(
        "minimax_m3_vl",
        text_config=text,
        vision_config={**TOWER, "image_size": 32, "patch_size": 4},
        projector_hidden_size=64,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), **patches(96)})


def mistral3() -> Tiny:
    small = config(
        "mistral3", text_config={"model_type": "mistral", **TEXT}, vision_config=PIXTRAL, image_token_index=IMAGE
    )
    return Tiny(small, sized(small, 4))


MLA = {
    "n_routed_experts": 4,
    **MOE,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def mistral4() -> Impossible:
    return Impossible(
        "no image path: the auto class Mistral4ForCausalLM (input_modalities 'text') takes pixel_values without an"
        " error and ignores them, the logits stay equal; pictures reach mistral4 as the text_config of a mistral3,"
        " which is the row mistral3_mistral4"
    )


def mistral3_mistral4() -> Tiny:
    text = {"model_type": "mistral4", **TEXT, **MLA, "num_hidden_layers": 4, "first_k_dense_replace": 2}
    small = config("mistral3", text_config=text, vision_config=PIXTRAL, image_token_index=IMAGE)
    return Tiny(small, sized(small, 4), note="mistral4 as the language model of a mistral3")


def mistral_large4() -> Tiny:
    text = {**TEXT, **MLA, "num_hidden_layers": 4, "first_k_dense_replace": 2, "no_rope_layers": [1, 1, 0, 0]}
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
    small = config("mistral_large4", text_config={**text, **index}, vision_config=PIXTRAL, image_token_index=IMAGE)
    return Tiny(small, sized(small, 4))


def mllama() -> Tiny:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    small = config("mllama", text_config=text, vision_config=tower, image_token_index=IMAGE)
    rows = tokens(small, 1)
    picture = {
        "pixel_values": pixels(2, 1, 1, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, rows.shape[1], 1, 1, dtype=torch.long),
    }
    return Tiny(small, {"input_ids": rows, "attention_mask": torch.ones_like(rows), **picture})


def molmo2() -> Tiny:
    tower = {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "image_size": [32, 32], "patch_size": 8} | LOUD
    adapter = {"vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    adapter |= {"head_dim": 16, "intermediate_size": 96, "text_hidden_size": 64} | LOUD
    small = config(
        "molmo2",
        text_config={**TEXT, "vocab_size": 304, "additional_vocab_size": 16},
        vision_config=tower,
        adapter_config=adapter,
        image_patch_id=IMAGE,
        image_start_token_id=START,
        image_end_token_id=STOP,
        low_res_image_start_token_id=204,
        frame_start_token_id=205,
        frame_end_token_id=206,
    )
    cells = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # 2 x 2 patches to a token
    picture = {
        "pixel_values": pixels(2, 16, 192),
        "image_token_pooling": torch.cat([cells, cells + 16]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }
    return Tiny(small, {**typed(small, 4), **picture})


MUSE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "layer_types": ["window_attention", "full_attention"] * 2,
}


def muse_glimmer() -> Tiny:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    small = config(
        "muse_glimmer",
        text_config={**TEXT, **layers},
        vision_config=MUSE,
        out_hidden_size=128,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), **patches(96)})


def muse_spark() -> Tiny:
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    experts = {
        **MOE,
        "num_local_experts": 4,
        "moe_hidden_size": 32,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    }
    audio = {"patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [2, 2], "num_hidden_layers": 2}
    small = config(
        "muse_spark",
        text_config={**TEXT, **layers, **experts},
        vision_config=MUSE,
        audio_config={**audio, "out_hidden_size": 64},
        out_hidden_size=128,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=204,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), **patches(96)})


def nemotron_h_omni() -> Tiny:
    blocks = ["linear_attention", "moe", "full_attention", "mlp"] * 2
    text = {key: value for key, value in TEXT.items() if key != "num_hidden_layers"}
    mamba = {
        "layers_block_type": blocks,
        "use_mamba_kernels": False,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        **MOE,
        "moe_shared_expert_intermediate_size": 32,
    }
    small = config(
        "nemotron_h_omni",
        text_config={"model_type": "nemotron_h", **text, **mamba},
        vision_config={"model_type": "radio", **SQUARE, "mlp_ratio": 2.0, "max_img_size": 64, "num_cls_tokens": 1}
        | {"num_registers": 1, "video_temporal_patch_size": 2, "summary_idxs": [0]},
        vision_hidden_size=32,
        projector_hidden_size=64,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=204,
    )
    grid = torch.tensor([[4, 4], [4, 4]])
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(32, 192), "image_grid_hw": grid})


def ovis2() -> Tiny:
    small = config(
        "ovis2",
        text_config=QWEN2,
        vision_config={**SQUARE, "hidden_stride": 2, "vocab_size": 48},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[201, 202, 203, 204, 205],
        vocab_size=320,
        hidden_size=64,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS)})


def paddleocr_vl() -> Tiny:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    small = config(
        "paddleocr_vl",
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        **SPECIAL,
    )
    return Tiny(small, {**typed(small, 4), **patches(48), "pixel_values": pixels(32, 3, 4, 4)})


def paligemma() -> Tiny:
    small = config(
        "paligemma",
        text_config={"model_type": "gemma", **TEXT},
        vision_config={**SIGLIP, "projection_dim": 64},
        projection_dim=64,
        hidden_size=64,
        image_token_index=IMAGE,
        vocab_size=320,
    )
    return Tiny(small, {"input_ids": tokens(small, 16), "pixel_values": pixels(*PIXELS)})


def perception_lm() -> Tiny:
    args = {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": [32, 32],
        "patch_size": 8,
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": [4, 4],
    }
    tower = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "model_args": args}
    small = config(
        "perception_lm",
        text_config=LLAMA,
        vision_config={**tower, "do_pooling": True, "num_classes": 32},
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(2, 1, 3, 32, 32)})


def pi0() -> Tiny:
    vlm = {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma", **TEXT, "num_key_value_heads": 1},
        "vision_config": {**SIGLIP, "projection_dim": 64},
        "projection_dim": 64,
        "image_token_index": IMAGE,
    }
    small = config(
        "pi0",
        vlm_config=vlm,
        dit_config={
            "model_type": "gemma",
            **TEXT,
            "num_key_value_heads": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
        },
        chunk_size=4,
        max_state_dim=16,
        max_action_dim=16,
    )
    inputs = {
        "input_ids": tokens(small.vlm_config, 16),
        "pixel_values": pixels(2, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": pixels(2, 16),
        "noise": pixels(2, 4, 16),
        "timestep": torch.tensor([0.3, 0.7]),
    }
    other = {name: value for name, value in inputs.items() if value.is_floating_point()}
    other["pixel_values"] = pixels(2, 1, 3, 32, 32, seed=4)  # the robot's state and the noise stay as they are
    note = "the logits are action velocities; noise and timestep are given, else they are drawn"
    return Tiny(small, inputs, note=note, other=other)


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    make.__name__: make
    for make in (
        minimax_m3_vl,
        mistral3,
        mistral4,
        mistral3_mistral4,
        mistral_large4,
        mllama,
        molmo2,
        muse_glimmer,
        muse_spark,
        nemotron_h_omni,
        ovis2,
        paddleocr_vl,
        paligemma,
        perception_lm,
        pi0,
    )
}
