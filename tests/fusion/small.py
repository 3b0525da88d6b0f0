"""Tiny random encoders of every kind, inputs for them, and whole fusion models."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmft.fusion import FusionConfig, FusionModel, TableSchema

_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WAVE = {**_SMALL, "conv_dim": (8, 8), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2}
_WAVE |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
_BERT: dict[str, Any] = {"model_type": "bert", **_SMALL, "vocab_size": 60, "max_position_embeddings": 40}
_WHISPER = {"model_type": "whisper", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2}
_WHISPER |= {"encoder_ffn_dim": 24, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
_WHISPER |= {"num_mel_bins": 8, "max_source_positions": 12, "vocab_size": 60, "pad_token_id": 0}
_CLAP = {"model_type": "clap_audio_model", "spec_size": 32, "patch_size": 4, "patch_stride": [4, 4], "num_mel_bins": 8}
_CLAP |= {"hidden_size": 32, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2]}
_CLAP |= {"window_size": 4, "projection_dim": 16, "num_hidden_layers": 2}
SIDE = 32

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("text", _BERT),
    "roberta": ("text", {**_BERT, "model_type": "roberta", "pad_token_id": 1}),
    "vit": ("image", {"model_type": "vit", **_SMALL, "image_size": SIDE, "patch_size": 8}),
    "dinov2": ("image", {"model_type": "dinov2", **_SMALL, "image_size": SIDE, "patch_size": 8}),
    "resnet": (
        "image",
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "timm": ("image", {"model_type": "timm_wrapper", "architecture": "test_efficientnet", "do_pooling": False}),
    "frames": ("video", {"model_type": "vit", **_SMALL, "image_size": SIDE, "patch_size": 8}),
    "wav2vec2": ("audio", {"model_type": "wav2vec2", **_WAVE}),
    "wav2vec2_layer": (
        "audio",
        {"model_type": "wav2vec2", **_WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    ),
    "hubert": ("audio", {"model_type": "hubert", **_WAVE}),
    "whisper": ("audio", _WHISPER),
    "clap": ("audio", _CLAP),
}
SCHEMA = TableSchema({"age": (40.0, 10.0), "dose": (2.0, 0.5)}, {"site": ("a", "b", "c")})
FOUR = ("bert", "resnet", "hubert")
"""Encoders of the usual small model; a table comes with them."""


def entry(name: str) -> dict[str, Any]:
    """The entry of `FusionConfig.encoders` for a tiny encoder."""
    kind, config = ENCODERS[name]
    full = transformers.AutoConfig.for_model(**config).to_dict()
    return {"name": name, "kind": kind, "config": full}


def small_config(
    encoders: tuple[str, ...] = FOUR, *, table: bool = True, labels: int = 3, **fields: Any
) -> FusionConfig:
    """A fusion of width 16 over tiny encoders, without dropout."""
    given: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "rank": 3, "dropout": 0.0, **fields}
    return FusionConfig(
        encoders=[entry(name) for name in encoders],
        table=SCHEMA.as_config() if table else None,
        num_labels=labels,
        **given,
    )


def small_model(*arguments: Any, seed: int = 0, **fields: Any) -> FusionModel:
    """A model of `small_config` in float64 and evaluation."""
    torch.manual_seed(seed)
    return FusionModel(small_config(*arguments, **fields)).double().eval()


def small_inputs(names: tuple[str, ...] = (*FOUR, "table"), rows: int = 3, seed: int = 1) -> dict[str, dict[str, Any]]:
    """Inputs in float64 with padding where a kind has any: row 0 is full, later rows are shorter."""
    draw = torch.Generator().manual_seed(seed)
    return {name: _inputs(name, rows, draw) for name in names}


def _inputs(name: str, rows: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def mask(length: int) -> torch.Tensor:
        return (torch.arange(length) < length - (length // 4) * (torch.arange(rows) % 3)[:, None]).long()

    if name == "table":
        found = [{"age": 30 + 5 * i, "dose": None if i == 1 else 2.5, "site": "abz"[i % 3]} for i in range(rows)]
        return {key: v.double() if v.is_floating_point() else v for key, v in SCHEMA.encode(found).items()}
    kind = ENCODERS[name][0]
    if kind == "text":
        return {"input_ids": torch.randint(2, 60, (rows, 8), generator=draw), "attention_mask": mask(8)}
    if kind == "image":
        return {"pixel_values": normal(rows, 3, SIDE, SIDE)}
    if kind == "video":
        return {"pixel_values": normal(rows, 4, 3, SIDE, SIDE), "frame_mask": mask(4)}
    if name == "whisper":
        return {"input_features": normal(rows, 8, 24), "attention_mask": mask(24)}
    if name == "clap":
        return {"input_features": normal(rows, 1, 128, 8), "is_longer": torch.zeros(rows, 1, dtype=torch.bool)}
    return {"input_values": normal(rows, 60), "attention_mask": mask(60)}
