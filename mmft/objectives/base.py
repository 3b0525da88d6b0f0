"""The wall between the engine and what it minimises.

An objective turns a model and a batch into a *sum* and a *count*; the engine divides once per optimizer step, by the
count of the whole step over all micro-batches and ranks. A mean of means would weigh short batches too much.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from mmft.data.collate import Batch


@dataclass(frozen=True, slots=True)
class Loss:
    """`sum`: fp32 scalar with a graph; `count`: what it is a sum over; `logs`: further sums over the same count."""

    sum: Tensor
    count: int
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop knows about an objective."""

    name: str

    def count(self, batch: Batch) -> int:
        """The count `loss` will return for this batch, without a forward (the step's divisor is needed first)."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """One forward. `model` may be wrapped for distribution; it is called, never reached into."""
        ...
