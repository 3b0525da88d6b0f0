"""What a tiny model of a family is, and inputs for it; `shrink` makes the default config of a model type small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.families.shrink import PATCH, SIDE, TOKEN, VOCABULARY, WIDTH, from_values, shrink, small_values

__all__ = [
    "PATCH",
    "SIDE",
    "VOCABULARY",
    "WIDTH",
    "Impossible",
    "Tiny",
    "from_values",
    "image_token",
    "pixels",
    "shrink",
    "small_values",
    "special_tokens",
    "tokens",
]


@dataclass(frozen=True)
class Tiny:
    """One small model of a family and what to call it with."""

    config: PreTrainedConfig
    """Less than a million weights, widths multiples of 16, two layers and each kind of layer that the family has."""
    inputs: dict[str, torch.Tensor]
    """`model(**inputs)` runs on a CPU in float32; two rows, with a picture (or sound) that the output depends on."""
    cls: type | None = None
    """Model class where transformers' auto mapping is not meant."""
    output: str = "logits"
    """Field of the output that is compared."""
    note: str = ""
    targets: tuple[str, ...] = ("language.attention",)
    """What LoRA is put on; `projector` is added where the model has one that LoRA can sit on."""
    call: str = ""
    """The sub-model that is called, where the whole has no forward pass (`thinker`)."""
    files: dict[str, bytes] | None = None
    """Files of every checkpoint of this family that `save_pretrained` does not write and `from_pretrained` needs."""
    other: dict[str, torch.Tensor] | None = None
    """Inputs that replace some of `inputs` for another picture, where pictures are not just real numbers."""


@dataclass(frozen=True)
class Impossible:
    """A family that cannot be built or run here."""

    reason: str
    """The upstream reason in one line, with the exception's text."""


def tokens(config: PreTrainedConfig, image_tokens: int, *, text: int = 8) -> torch.Tensor:
    """input_ids (2, text + image_tokens): half of the text, the image token repeated, the other half.

    The text holds no special token; the rows differ. Without `image_tokens` there is text alone.
    """
    special = special_tokens(config)
    plain = torch.tensor([number for number in range(5, 190) if number not in special])
    source = torch.Generator().manual_seed(1)
    words = plain[torch.randint(len(plain), (2, text), generator=source)]
    if not image_tokens:
        return words
    picture = torch.full((2, image_tokens), image_token(config))
    return torch.cat((words[:, : text // 2], picture, words[:, text // 2 :]), 1)


def image_token(config: PreTrainedConfig) -> int:
    """The number of the image token (of the audio token where there is no image)."""
    for name in ("image_token_id", "image_token_index", "image_patch_id", "audio_token_id", "audio_token_index"):
        for holder in (config, getattr(config, "text_config", None), getattr(config, "thinker_config", None)):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return found
    raise ValueError(f"{config.model_type} names no image token")


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """Every number that the config names as a token."""

    def walk(values: Mapping[str, Any]) -> set[int]:
        found: set[int] = set()
        for key, value in values.items():
            if isinstance(value, dict):
                found |= walk(value)
            elif isinstance(key, str) and TOKEN.search(key):
                found |= {item for item in (value if isinstance(value, (list, tuple)) else [value]) if item}
        return found

    return walk(config.to_dict())


def pixels(*shape: int, seed: int = 2) -> torch.Tensor:
    """Random pixels (or sound) of any shape, normally distributed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
