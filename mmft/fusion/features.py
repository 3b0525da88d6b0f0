"""The one datum inside a fusion model: what a modality says about every row of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Tokens of one modality: `tokens` (B, T, D), `mask` (B, T) true where there is a token, `present` (B,) true where
    the row has the modality, `pooled` (B, D). Where a mask is false the token is 0; every row has a token."""

    tokens: Tensor
    mask: Tensor
    present: Tensor
    pooled: Tensor

    def with_pooled(self, pooled: Tensor) -> Features:
        """The same tokens with another summary."""
        return replace(self, pooled=pooled)


def scatter_rows(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """(n, ...) at the rows `rows` (n,) of a zero tensor (size, ...); differentiable."""
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, rows, values)


def heard(present: Tensor) -> Tensor:
    """(B, M) bool -> the modalities that have a say in each row: those present, or all where a row has none."""
    return present | ~present.any(dim=1, keepdim=True)


def share(weights: Tensor, present: Tensor) -> Tensor:
    """Softmax of `weights` (M,) over each row's heard modalities: (B, M), rows sum to 1, 0 for the absent."""
    scores = (
        (weights if weights.dtype == torch.float64 else weights.float())
        .expand_as(present)
        .masked_fill(~heard(present), float("-inf"))
    )
    return torch.softmax(scores, dim=1).to(weights.dtype)


def drop_modalities(present: Tensor, probability: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Modality dropout (after Neverova et al. 2016, ModDrop): every present modality of a row is dropped with
    `probability`; a row that would lose all of them keeps one of its own, drawn evenly.

    present (B, M) bool, on any device; drawn on the CPU so that a seed means the same everywhere. Rows without any
    modality stay as they are.
    """
    drawn = torch.rand(present.shape, generator=generator)
    lucky = torch.rand(present.shape, generator=generator)
    there = present.cpu()
    kept = there & (drawn >= probability)
    rescued = torch.zeros_like(kept)
    rescued.scatter_(1, lucky.masked_fill(~there, -1.0).argmax(dim=1, keepdim=True), True)
    return torch.where(kept.any(dim=1, keepdim=True), kept, rescued & there).to(present.device)
