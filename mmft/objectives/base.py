"""The wall between the engine and what it minimises.

An objective turns a model and a batch into a *sum* and a *count*; the engine divides once per optimizer step, by the
count of the whole step over all micro-batches and ranks. A mean of means would weigh short batches too much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mmft.data.collate import Batch


@dataclass(frozen=True, slots=True)
class Loss:
    """`sum`: fp32 scalar with a graph; `count`: what it is a sum over; `logs`: further sums over the same count;
    `each`: what each row adds to the sum, without a graph, where the objective of a whole step tells it."""

    sum: Tensor
    count: int
    logs: dict[str, Tensor] = field(default_factory=dict)
    each: Tensor | None = None


def by_source(terms: Tensor, batch: Batch, *, counts: Tensor | None = None, what: str = "loss") -> dict[str, Tensor]:
    """Logs `loss of NAME` and `terms of NAME` for the data sets in a batch, from the terms (n,) whose sum is its loss,
    or with `counts` (rows,) from what each row adds to the loss and to its count; {} where the batch does not say whose
    they are. `what`: the name of what is summed."""
    told = [count for _, count in batch.counted] if counts is None else [1] * len(batch.counted)
    if sum(told) != len(terms):
        return {}
    sizes = terms.new_tensor(told).double() if counts is None else counts.double()
    found: dict[str, Tensor] = {}
    parts = terms.detach().double().split(told)
    for (name, _), part, size in zip(batch.counted, parts, sizes, strict=True):
        for key, value in ((f"{what} of {name}", part.sum()), (f"terms of {name}", size)):
            found[key] = found[key] + value if key in found else value
    return found


class Objective(Protocol):
    """What the loop knows about an objective."""

    name: str
    """Objectives may also have `told_by_source`: what by data set is told beside the terms, "loss" if not given."""

    @property
    def metrics(self) -> Mapping[str, tuple[str, str]]:
        """What is shown of a step beside the loss: name -> (sum, over), two names of `Loss.logs`, or "count" for the
        step's count. Sums are added over micro-batches and ranks, then divided once. A plain attribute will do."""
        ...

    def count(self, batch: Batch) -> int:
        """The count `loss` will return for this batch, without a forward (the step's divisor is needed first)."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """One forward. `model` may be wrapped for distribution; it is called, never reached into."""
        ...


@dataclass(frozen=True)
class StepContext:
    """What an objective that takes a whole optimizer step at once is told about it.

    `count`: the step's divisor over all ranks; `seeds`: one for the dropout of each micro-batch of this rank; `place`
    moves a batch to the device and type of the model; `autocast` opens the forward's precision; `number` counts the
    finished steps, `update` the finished updates of this one (see `updates`). Work that comes before the ranks exchange
    something belongs into `with step.together():`, so that all of them learn when the memory of one ran out in it.
    """

    count: float
    seeds: tuple[int, ...]
    place: Callable[[Batch], Batch]
    autocast: Callable[[], AbstractContextManager[Any]]
    rank: int = 0
    world: int = 1
    number: int = 0
    update: int = 0
    together: Callable[[], AbstractContextManager[Any]] = nullcontext


@runtime_checkable
class StepObjective(Protocol):
    """An objective whose loss is no sum over micro-batches: it makes the gradients of a step itself.

    One that has an attribute `updates` above 1 is asked for gradients that often in a step, with an update of the
    weights after each; what it keeps in between is gone with the step.
    """

    def backward(self, model: nn.Module, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
        """This rank's share of the step's gradients into the trained parameters (the engine sums them over ranks), and
        of the sums of loss and logs."""
        ...

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """Bring trained weights (by name, in float32) back into their bounds after an update, in place."""
        ...
