"""Values that are put in place or added as they are: saved modules, norms, single tokens, biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmft.errors import ExportError
from mmft.export.deltas.base import DAMAGED, Adapter, Homeless, Matrix, Merge, Site, Step


@dataclass(frozen=True)
class Replace:
    """`W' = V`: modules_to_save, LayerNorm tuning, trained biases, embeddings saved whole (also resized ones)."""

    key: str
    kind: str = "replaced"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its one tensor."""
        return (self.key,)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Reads row blocks of the new values; holds nothing."""

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            scalar = not adapter.shape(self.key)
            fresh = adapter.weights.read(self.key) if scalar else adapter.weights.read(self.key, start, stop)
            fresh = fresh.reshape(stop - start, weight.width).to(rows.dtype)
            return fresh, fresh.float() - rows.float()

        return merge


@dataclass(frozen=True)
class Tokens:
    """Single rows of an embedding table put in place (`trainable_token_indices`); the other rows stay."""

    key: str
    indices: tuple[int, ...]
    kind: str = "tokens"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its one tensor."""
        return (self.key,)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the trained rows."""
        values = adapter.weights.read(self.key)
        row_of = {index: row for row, index in enumerate(self.indices)}

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            fresh = rows.clone()
            for index, row in row_of.items():
                if start <= index < stop:
                    fresh[index - start] = values[row].to(rows.dtype)
            return fresh, fresh.float() - rows.float()

        return merge


@dataclass(frozen=True)
class BiasAdd:
    """`b' = b + s c`, the bias of LoRA's second factor."""

    key: str
    scaling: float
    kind: str = "bias"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its one tensor."""
        return (self.key,)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the bias."""
        bias = adapter.factor(self.key)

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            delta = bias[start:stop, None] * self.scaling
            rows += delta
            return rows, delta

        return merge


TOKENS = "trainable_tokens_delta"


def token_step(site: Site) -> list[tuple[str, Step]]:
    """The step of a site that holds trained token rows. Raises ExportError when the config has no indices for it."""
    key = site.need(TOKENS)
    chosen = site.option("trainable_token_indices") or site.option("token_indices")
    if isinstance(chosen, dict):
        ends = [name for name in chosen if f".{site.module}".endswith(f".{name}")]
        chosen = chosen[max(ends, key=len)] if ends else None
    shape = site.shape()
    count, width = site.adapter.shape(key)
    if not chosen or len(chosen) != count or max(chosen) >= shape[0]:
        raise ExportError(
            f"{site.module}: the adapter holds {count} token rows, its config names {len(chosen or ())}",
            where=str(site.adapter.folder),
            allowed=f"as many indices as rows, below {shape[0]}",
            do=DAMAGED,
        )
    if width != shape[1]:
        raise Homeless
    return [(site.name(), Tokens(key, tuple(int(index) for index in chosen)))]
