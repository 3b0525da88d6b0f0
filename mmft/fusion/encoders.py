"""Any transformers encoder as a source of tokens: inputs -> (B, T, D) and a mask (B, T).

A row's tokens never depend on what pads it: text goes with its attention mask, frames of a video that are not there are
not looked at, and waveforms go through an encoder whose normalisation runs over time one length at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from mmft.errors import BackboneError, DataError
from mmft.fusion.layers import mean_of

_WITHOUT_AUTO = {"clap_audio_model": "ClapAudioModel"}
"""Encoders that AutoModel has no entry for."""
_TOWERS = {"text": "text_model", "image": "vision_model", "video": "vision_model", "audio": "audio_model"}
_INPUTS = {
    "text": ("input_ids",),
    "image": ("pixel_values",),
    "video": ("pixel_values",),
    "audio": ("input_values", "input_features"),
}


def build_tower(config: Any, kind: str) -> Any:
    """The encoder of a transformers config with random weights: a dual encoder gives its tower of that kind, an
    encoder-decoder its encoder."""
    if config.model_type in _WITHOUT_AUTO:
        import transformers

        return getattr(transformers, _WITHOUT_AUTO[config.model_type])(config)
    model = AutoModel.from_config(config)
    return tower_of(model, kind)


def tower_of(model: Any, kind: str) -> Any:
    """The encoder inside a model as `from_pretrained` gives it, without a head; the model itself where it is one."""
    model = model.base_model if isinstance(model.base_model, PreTrainedModel) else model
    inner = getattr(model, _TOWERS[kind], None)
    if isinstance(inner, nn.Module) and hasattr(model.config, f"{_TOWERS[kind].removesuffix('_model')}_config"):
        return inner
    return model.get_encoder() if model.config.is_encoder_decoder else model


class ModalityEncoder(nn.Module):
    """One tower with its way of being asked. `width`: D of its tokens; `has_cls`: its first token stands for all."""

    def __init__(self, tower: Any, kind: str) -> None:
        super().__init__()
        self.tower, self.kind = tower, kind
        if "add_pooling_layer" in inspect.signature(type(tower).__init__).parameters:
            tower.pooler = None  # never asked; whether a checkpoint has one depends on the task it was made for
        self.width = _width(tower)

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, D), 0 where the mask is false, and the mask (B, T). What each kind reads:

        text: input_ids, attention_mask (B, L). image: pixel_values (B, C, H, W). video: pixel_values (B, F, C, H, W),
        frame_mask (B, F); one token per frame, the mean of the frame's. audio: input_values (B, L) with
        attention_mask, or input_features with an optional attention_mask over frames (Whisper attends to its padding
        by design; the mask keeps it out of the fusion).
        Raises DataError for inputs of the wrong name or a sound too short for one frame.
        """
        given = next((inputs[name] for name in _INPUTS[self.kind] if name in inputs), None)
        if given is None:
            raise DataError(
                f"a {self.kind} encoder got {', '.join(inputs) or 'nothing'}",
                allowed=" or ".join(_INPUTS[self.kind]),
                do="use the FusionProcessor of this model",
            )
        if self.kind == "video":
            tokens, mask = self._frames(given, inputs.get("frame_mask"))
        elif "input_values" in inputs:
            tokens, mask = self._waveforms(given, inputs.get("attention_mask"))
        elif self.kind == "text":
            mask = inputs.get("attention_mask", torch.ones_like(given)).bool()
            extra = {"token_type_ids": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}
            tokens = self.tower(input_ids=given, attention_mask=mask.long(), **extra).last_hidden_state
        elif self.kind == "audio":
            tokens, mask = self._spectrograms(given, inputs)
        else:
            tokens, mask = _whole(self.tower(pixel_values=given).last_hidden_state)
        return tokens.masked_fill(~mask.unsqueeze(-1), 0.0), mask

    @property
    def has_cls(self) -> bool:
        """True for encoders whose first token is made to stand for the whole: text and patch transformers."""
        config = self.tower.config
        patches = hasattr(config, "patch_size") and hasattr(config, "num_attention_heads")
        return self.kind == "text" or (self.kind == "image" and patches)

    def _frames(self, pixels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        there = torch.ones(pixels.shape[:2], dtype=torch.bool, device=pixels.device) if mask is None else mask.bool()
        tokens, inner = _whole(self.tower(pixel_values=pixels[there]).last_hidden_state)
        frames = tokens.new_zeros(*there.shape, tokens.shape[-1])
        return frames.masked_scatter(there.unsqueeze(-1), mean_of(tokens, inner)), there

    def _spectrograms(self, features: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        extra = {"is_longer": inputs["is_longer"]} if "is_longer" in inputs else {}
        tokens, mask = _whole(self.tower(input_features=features, **extra).last_hidden_state)
        frames = inputs.get("attention_mask")
        if frames is not None:
            stride = -(-frames.shape[1] // tokens.shape[1])
            mask = frames[:, ::stride].bool()
        return tokens, mask

    def _waveforms(self, waves: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = torch.ones_like(waves, dtype=torch.long) if mask is None else mask.long()
        lengths = mask.sum(dim=1)
        frames = self._frame_counts(lengths)
        if int(frames.min()) < 1:
            raise DataError(
                f"a sound of {int(lengths.min())} samples is too short for one frame of this encoder",
                allowed=f"at least {self._shortest()} samples",
                do="leave the sound out of the row (None), or give a longer one",
            )
        config = self.tower.config
        if config.feat_extract_norm == "layer" and not getattr(config, "add_adapter", False):
            tokens = self.tower(input_values=waves * mask, attention_mask=mask).last_hidden_state
            return tokens, torch.arange(tokens.shape[1], device=waves.device) < frames[:, None]
        # A group norm runs over time and would see the padding: rows of one length at a time.
        rows: dict[int, Tensor] = {}
        for length in lengths.unique().tolist():
            same = (lengths == length).nonzero().flatten()
            found = self.tower(input_values=waves[same, :length]).last_hidden_state
            rows.update(zip(same.tolist(), found, strict=True))
        tokens = pad_sequence([rows[index] for index in range(len(waves))], batch_first=True)
        counts = torch.tensor([len(rows[index]) for index in range(len(waves))], device=waves.device)
        return tokens, torch.arange(tokens.shape[1], device=waves.device) < counts[:, None]

    def _frame_counts(self, lengths: Tensor) -> Tensor:
        for kernel, stride in zip(self.tower.config.conv_kernel, self.tower.config.conv_stride, strict=True):
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths

    def _shortest(self) -> int:
        needed = 1
        steps = list(zip(self.tower.config.conv_kernel, self.tower.config.conv_stride, strict=True))
        for kernel, stride in reversed(steps):
            needed = (needed - 1) * stride + kernel
        return needed


def _whole(states: Tensor) -> tuple[Tensor, Tensor]:
    """A sequence (B, T, D) as it is, a grid (B, D, h, w) as h * w tokens; nothing is masked."""
    tokens = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _width(tower: Any) -> int:
    """Width of a tower's tokens. Raises BackboneError where neither module nor config tells."""
    for holder in (getattr(tower, "timm_model", None), getattr(tower, "audio_encoder", None)):
        if isinstance(getattr(holder, "num_features", None), int):
            return int(holder.num_features)  # type: ignore[union-attr]
    config = tower.config
    sizes = getattr(config, "hidden_sizes", None)
    found = sizes[-1] if sizes else getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if not isinstance(found, int):
        raise BackboneError(
            f"the width of a {config.model_type} encoder is not known",
            where=type(tower).__name__,
            allowed="encoders with hidden_size, hidden_sizes or d_model in their config",
            do="use another encoder",
        )
    return found
