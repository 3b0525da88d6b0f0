"""The protocol of a merge step, and what a family of methods sees of the model and the adapter folder.

Every parameter is seen as a matrix of rows: `(n,)` as `(n, 1)`, a kernel `(out, in, kh, kw)` as `(out, in·kh·kw)`, a
stack of experts `(E, a, b)` as `(E·a, b)`. A step gets a block of rows and returns it merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.errors import ExportError
from mmft.export.shards import Weights

DAMAGED = "give the adapter folder as peft or mmft wrote it"
WHOLE = "merge with peft's merge_and_unload"


@dataclass(frozen=True)
class Adapter:
    """An opened adapter folder: `method` is its peft_type, `options` its config with peft's defaults filled in."""

    method: str
    options: Mapping[str, Any]
    weights: Weights = field(repr=False)
    folder: Path

    def factor(self, key: str) -> torch.Tensor:
        """A tensor of the file in float32, as peft loads it."""
        return self.weights.read(key).to(torch.float32)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor of the file."""
        return self.weights.entries[key].shape


@dataclass(frozen=True)
class Matrix:
    """A weight as rows: `read(start, stop)` gives a new tensor (stop - start, width) of what the step starts from."""

    rows: int
    width: int
    read: Callable[[int, int], torch.Tensor] = field(repr=False)
    blocks: Callable[[], Iterator[tuple[int, int]]] = field(repr=False)


Merge = Callable[[torch.Tensor, int, int], tuple[torch.Tensor, torch.Tensor]]
"""(rows of the weight, start, stop) -> (merged rows, what was added to them); the rows may be changed in place."""


@dataclass(frozen=True)
class Sum:
    """A `Merge` that adds `delta(start, stop)`, float32, and rounds once, as peft does for linear layers."""

    delta: Callable[[int, int], torch.Tensor]

    def __call__(self, rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum in the type of `rows`, and the delta."""
        return self.onto(rows.float(), start, stop, dtype=rows.dtype)

    def onto(
        self, wide: torch.Tensor, start: int, stop: int, *, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from rows that are float32 already; they are changed in place.

        The bits of `rows += delta`, whose kernel for two types is three times slower.
        """
        delta = self.delta(start, stop)
        return wide.add_(delta).to(dtype), delta


class Step(Protocol):
    """One thing that happens to one parameter."""

    @property
    def kind(self) -> str:
        """A word for the report."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Adapter tensors it uses."""
        ...

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Read the factors; a step whose scale depends on whole columns also reads `weight` once, in blocks."""
        ...


class Homeless(Exception):
    """The tensors of a module do not fit it."""


@dataclass(frozen=True)
class Site:
    """The adapter tensors of one module. `parts` maps `lora_A.weight`, `ia3_l`, … to keys of the file.

    `layer` is the module on the meta device; None for a weight that is a module only in the checkpoint's own layout
    (an expert that the loader stacks, a projection that it fuses).
    """

    adapter: Adapter
    module: str
    spelled: str  # the module as the key has it
    layer: nn.Module | None
    parts: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    depth: int = 0  # how many wrappers lie around it (`.base_layer` at the end of the key)

    def need(self, part: str) -> str:
        """The key of a part. Raises Homeless when the file has none."""
        if part not in self.parts:
            raise Homeless
        return self.parts[part]

    def shape(self, leaf: str = "weight") -> tuple[int, ...]:
        """Shape of a parameter of the module. Raises Homeless when it has none."""
        if self.name(leaf) not in self.shapes:
            raise Homeless
        return self.shapes[self.name(leaf)]

    def name(self, leaf: str = "weight") -> str:
        """Full name of a parameter of the module."""
        return f"{self.module}.{leaf}" if self.module else leaf

    def option(self, name: str) -> Any:
        """A field of the adapter's config."""
        return self.adapter.options.get(name)

    def pattern(self, name: str, default: str, key: str | None = None) -> Any:
        """The value of a pattern field (`rank_pattern`) for this module, else that of the field `default`."""
        patterns = self.option(name) or {}
        for spelling in (key or self.module, self.spelled):
            found = get_pattern_key(list(patterns), spelling)
            if found in patterns:
                return patterns[found]
        return self.option(default)

    def refuse(self, method: str, allowed: str, do: str = WHOLE) -> ExportError:
        """The error for a layer type that the streaming merge does not know."""
        layer = type(self.layer).__name__
        groups = getattr(self.layer, "groups", 1)
        text = f"{layer} with {groups} groups" if groups != 1 else layer
        return ExportError(
            f"{method} on {self.module} ({text}) cannot be merged by streaming",
            where=str(self.adapter.folder),
            allowed=allowed,
            do=do,
        )


def is_conv(layer: nn.Module | None) -> bool:
    """Whether it is a convolution."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def is_linear(layer: nn.Module | None) -> bool:
    """Whether rows of its weight are outputs; so are those of a weight that is a module only on disk."""
    return layer is None or isinstance(layer, nn.Linear)


def is_transposed(layer: nn.Module | None) -> bool:
    """Whether rows of its weight are inputs (transformers' Conv1D, of GPT-2)."""
    return isinstance(layer, Conv1D)
