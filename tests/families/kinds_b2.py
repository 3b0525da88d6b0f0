"""Tiny members of the families pix2struct ... vision-encoder-decoder: small config, two rows with a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.families.kinds_b import (
    IMAGE,
    MOE,
    PIXELS,
    QWEN2,
    QWEN3_5,
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
    typed,
)
from tests.families.tiny import Impossible, Tiny, pixels, tokens

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
SAM = {**TOWER, "image_size": 32, "patch_size": 4, "output_channels": 16, "mlp_dim": 64, "window_size": 2}
SAM |= {"global_attn_indexes": [1], "initializer_range": 0.1}
"""Segment Anything's tower: 8 x 8 patches, one layer in windows and one whole; two strided convolutions leave 2 x 2.
Its default spread of 1e-10 would leave nothing of the picture."""
WORDS = torch.tensor([[1, 20, 30, 40], [1, 50, 60, 70]])
"""What a decoder has said so far."""


def pix2struct() -> Tiny:
    sizes = {"hidden_size": 64, "d_kv": 16, "d_ff": 96}
    small = config(
        "pix2struct",
        text_config={**sizes, "num_layers": 2, "num_heads": 4, "vocab_size": 320},
        vision_config={**sizes, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_embed_hidden_size": 48}
        | {"seq_len": 32, "initializer_range": 0.02},
    )
    cells = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float().expand(2, 16, 2)
    one, two = (torch.cat([cells, pixels(2, 16, 48, seed=seed)], -1) for seed in (2, 4))
    inputs = {"flattened_patches": one, "attention_mask": torch.ones(2, 16), "decoder_input_ids": WORDS}
    return Tiny(small, inputs, note="row and column number lead each patch", other={"flattened_patches": two})


def pp_chart2table() -> Tiny:
    small = config("pp_chart2table", text_config=QWEN2, vision_config=SAM, image_token_index=IMAGE)
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS)})


def pp_formulanet() -> Tiny:
    text = {"vocab_size": 320, "d_model": 64, "max_position_embeddings": 128, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "init_std": 0.1}
    ends = {"post_conv_in_channels": 16, "post_conv_mid_channels": 32, "post_conv_out_channels": 32}
    small = config(
        "pp_formulanet", text_config={**text, **heads}, vision_config={**SAM, **ends, "decoder_hidden_size": 64}
    )
    return Tiny(small, {"pixel_values": pixels(*PIXELS), "decoder_input_ids": WORDS})


def qianfan_ocr() -> Tiny:
    small = config(
        "qianfan_ocr",
        text_config={"model_type": "qwen3", **TEXT},
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS)})


def qwen2_vl() -> Tiny:
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    small = config("qwen2_vl", text_config={**TEXT, "rope_parameters": MROPE}, vision_config=tower, **SPECIAL)
    return Tiny(small, {**typed(small, 4), **patches(96)})


QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
QWEN3 = {**QWEN, "num_position_embeddings": 16}
WINDOWS = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1]}
AUDIO = {
    "num_mel_bins": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "d_model": 32,
    "max_source_positions": 64,
    "output_dim": 64,
}


def qwen2_5_vl() -> Tiny:
    return _qwen("qwen2_5_vl", {}, WINDOWS)


def qwen2_5_omni_thinker() -> Tiny:
    return _qwen("qwen2_5_omni_thinker", {}, WINDOWS, audio_config={**AUDIO, "n_window": 8}, audio_token_index=204)


def qwen3_vl() -> Tiny:
    return _qwen("qwen3_vl", {}, {**QWEN3, "deepstack_visual_indexes": [0, 1]})


def qwen3_vl_moe() -> Tiny:
    return _qwen(
        "qwen3_vl_moe", {**MOE, **SPARSE, "num_local_experts": 4}, {**QWEN3, "deepstack_visual_indexes": [0, 1]}
    )


def qwen3_omni_moe_thinker() -> Tiny:
    return _qwen(
        "qwen3_omni_moe_thinker",
        {**MOE, **SPARSE, "num_experts": 4},
        {**QWEN3, "deepstack_visual_indexes": [0, 1]},
        audio_config={**AUDIO, "downsample_hidden_size": 16},
        audio_token_id=204,
    )


def qwen3_5() -> Tiny:
    return _qwen("qwen3_5", HYBRID, QWEN3)


def qwen3_5_moe() -> Tiny:
    return _qwen("qwen3_5_moe", {**HYBRID, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}, QWEN3)


def qwen4_exp() -> Tiny:
    """With the n-gram embeddings of the first layer and the token index of the attention layers."""
    layers = ["linear_attention", "linear_attention", "indexed_attention", "indexed_attention"]
    experts = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}
    streams = {"hc_count": 2, "hc_lowrank": 16}
    ngrams = {"ple_layer_ids": [1], "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 64}
    ngrams |= {"make_ngram_vocab_size_divisible_by": 16, "split_ngram_parts": 2}
    index = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
    index |= {"indexer_compress_ratio": 4}
    text = {**HYBRID, "layer_types": layers, **experts, **streams, **ngrams, **index}
    return _qwen("qwen4_exp", text, QWEN3)


SPARSE = {"num_hidden_layers": 4, "mlp_only_layers": [0, 1]}
"""Two dense layers, two of experts."""
HYBRID = {key: value for key, value in QWEN3_5.items() if key != "model_type"}


def _qwen(kind: str, text: dict[str, Any], tower: dict[str, Any], **more: Any) -> Tiny:
    values = {"text_config": {**TEXT, "rope_parameters": MROPE, **text}, "vision_config": tower, **SPECIAL, **more}
    if "omni" in kind:
        values |= {"image_token_index": IMAGE, "video_token_index": VIDEO} if "2_5" in kind else {}
    small = config(kind, **values)
    rows = {"input_ids": tokens(small, 4)} if "omni" in kind else typed(small, 4)
    return Tiny(small, {**rows, **patches(96)})


def shieldgemma2() -> Tiny:
    layers = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 4, "layer_types": layers, "sliding_window": 8, "query_pre_attn_scalar": 16}
    small = config(
        "shieldgemma2",
        text_config=text,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=STOP,
        yes_token_index=30,
        no_token_index=31,
    )
    rows = typed(small, 4)
    rows["token_type_ids"] = rows.pop("mm_token_type_ids")
    note = "class of the checkpoints; the auto class Gemma3ForConditionalGeneration does not read what it saves"
    cls = transformers.ShieldGemma2ForImageClassification
    return Tiny(small, {**rows, "pixel_values": pixels(*PIXELS)}, cls=cls, note=note)


def smolvlm() -> Tiny:
    small = config(
        "smolvlm",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "smolvlm_vision", **SQUARE},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    picture = {
        "pixel_values": pixels(2, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(2, 1, 32, 32, dtype=torch.bool),
    }
    return Tiny(small, {"input_ids": tokens(small, 4), **picture})


def step3p7() -> Tiny:
    text = {
        **TEXT,
        **MOE,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "sliding_window": 8,
        "num_sliding_attention_heads": 8,
        "n_routed_experts": 4,
        "share_expert_dim": 32,
        "swiglu_limits": [None, None, 7.0, None],
    }
    small = config(
        "step3p7",
        text_config=text,
        vision_config={**SQUARE, "patch_size": 4, "mlp_ratio": 2.0, "max_position_embeddings": 64},
        image_token_id=IMAGE,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS)})


def t5gemma2() -> Tiny:
    layers = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    text = {**TEXT, "num_hidden_layers": 4, "layer_types": layers, "sliding_window": 8, "query_pre_attn_scalar": 16}
    ends = {"boi_token_index": START, "eoi_token_index": STOP}
    encoder = {
        "text_config": text,
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        **ends,
    }
    small = config("t5gemma2", encoder=encoder, decoder=text, image_token_index=IMAGE)
    return Tiny(small, {"input_ids": tokens(small, 4), "pixel_values": pixels(*PIXELS), "decoder_input_ids": WORDS})


def udop() -> Tiny:
    small = config(
        "udop",
        vocab_size=320,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        max_2d_position_embeddings=64,
        image_size=32,
        patch_size=8,
    )
    corner = torch.rand(2, 8, 2, generator=torch.Generator().manual_seed(5)) * 0.8
    boxes = {"bbox": torch.cat([corner, corner + 0.1], -1)}
    rows = {"input_ids": tokens(small, 0), **boxes, "decoder_input_ids": WORDS}
    return Tiny(small, {**rows, "pixel_values": pixels(*PIXELS)})


def unlimited_ocr() -> Tiny:
    encoder = {**SQUARE, "image_size": 8, "patch_size": 4}
    text = {**TEXT, **MOE, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
    small = config(
        "unlimited_ocr",
        vision_config={"sam_config": {**SAM, "downsample_channels": [32, 32]}, "encoder_config": encoder},
        text_config={**text, "n_routed_experts": 4, "n_shared_experts": 1, "sliding_window": 8},
        image_token_id=IMAGE,
    )
    note = "2 x 2 patches, a newline after each row, a separator: 7 tokens"
    return Tiny(small, {"input_ids": tokens(small, 7), "pixel_values": pixels(*PIXELS)}, note=note)


def video_llama_3() -> Tiny:
    small = config(
        "video_llama_3",
        text_config=QWEN2,
        vision_config={**TOWER, "patch_size": 4},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return Tiny(small, {"input_ids": tokens(small, 4), **patches(48), "image_merge_sizes": torch.tensor([2, 2])})


def vision_encoder_decoder() -> Tiny:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    talk = {"is_decoder": True, "add_cross_attention": True, "vocab_size": 320, "max_position_embeddings": 128}
    small = config(
        "vision-encoder-decoder",
        encoder={"model_type": "vit", **SQUARE},
        decoder={"model_type": "bert", **sizes, **talk},
        decoder_start_token_id=1,
        pad_token_id=0,
    )
    return Tiny(small, {"pixel_values": pixels(*PIXELS), "decoder_input_ids": WORDS})


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    make.__name__: make
    for make in (
        pix2struct,
        pp_chart2table,
        pp_formulanet,
        qianfan_ocr,
        qwen2_5_omni_thinker,
        qwen2_5_vl,
        qwen2_vl,
        qwen3_5,
        qwen3_5_moe,
        qwen3_omni_moe_thinker,
        qwen3_vl,
        qwen3_vl_moe,
        qwen4_exp,
        shieldgemma2,
        smolvlm,
        step3p7,
        t5gemma2,
        udop,
        unlimited_ocr,
        video_llama_3,
    )
}
KINDS["vision-encoder-decoder"] = vision_encoder_decoder
