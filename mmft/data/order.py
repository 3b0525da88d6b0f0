"""The order of the rows as arithmetic: which rows a step sees is a pure function of (rows, seed, step).

Nothing here depends on the number of processes or workers, so a run resumes by its step number alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmft.data.mixture import Mixture
from mmft.seeds import fold


def epoch_order(rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(rows)` for one epoch, int64 of shape (rows,); O(rows)."""
    return np.random.Generator(np.random.PCG64(fold(seed, "order", epoch))).permutation(rows)


@dataclass(frozen=True, eq=False)
class Together:
    """Rows that an epoch's order keeps next to each other: those with equal numbers >= 0 in `groups`."""

    groups: np.ndarray

    def order(self, order: np.ndarray) -> np.ndarray:
        """`order` with the rows of a group pulled to where the group's first row stands; O(n log n)."""
        groups = self.groups[order]
        alone = groups < 0
        groups = np.where(alone, np.arange(len(order)) + groups.max(initial=0) + 1, groups)
        _, first, place = np.unique(groups, return_index=True, return_inverse=True)
        return order[np.argsort(first[place], kind="stable")]


@lru_cache(maxsize=4)
def _kept_order(rows: int, seed: int, epoch: int, mixture: Mixture | None, together: Together | None) -> np.ndarray:
    order = epoch_order(rows, seed=seed, epoch=epoch)
    order = order if mixture is None else mixture.indices(seed=seed, epoch=epoch)[order]
    order = order if together is None else together.order(order)
    order.setflags(write=False)
    return order


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward's rows: `index` counts micro-batches within the step over all ranks; `rows` are (row, epoch)."""

    step: int
    index: int
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of every optimizer step over the endless stream of shuffled epochs.

    Step s covers stream positions [s * E, (s + 1) * E) with E = micro_batch * micro_per_step; a step may straddle
    the border of two epochs. `micro_per_step` counts over all ranks; micro-batch m goes to rank m % world, so the
    rows of a step are the same for every world size that divides the work. `rows` counts an epoch's: with a `mixture`
    its draws. `together`: groups are shuffled instead of rows, so that a group's rows meet in a step.
    """

    rows: int
    micro_batch: int
    micro_per_step: int
    world: int = 1
    seed: int = 0
    mixture: Mixture | None = None
    together: Together | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "micro_batch", "micro_per_step", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"StepPlan.{name} must be at least 1, got {getattr(self, name)}")
        if self.mixture is not None and self.mixture.rows != self.rows:
            raise ValueError(f"StepPlan.rows is {self.rows}, the mixture draws {self.mixture.rows}")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all ranks (E)."""
        return self.micro_batch * self.micro_per_step

    def steps_for(self, epochs: float) -> int:
        """The fewest steps that cover `epochs` passes over the data (at least one)."""
        return max(1, -(-round(epochs * self.rows) // self.rows_per_step))

    def epoch_at(self, step: int) -> float:
        """Passes over the data that are complete when `step` starts."""
        return step * self.rows_per_step / self.rows

    def at(self, position: int) -> tuple[int, int]:
        """(row, epoch) at a position of the stream."""
        epoch, offset = divmod(position, self.rows)
        return int(_kept_order(self.rows, self.seed, epoch, self.mixture, self.together)[offset]), epoch

    def micro_batch_at(self, step: int, index: int) -> MicroBatch:
        """Micro-batch `index` (over all ranks) of `step`."""
        start = step * self.rows_per_step + index * self.micro_batch
        return MicroBatch(step, index, tuple(self.at(position) for position in range(start, start + self.micro_batch)))

    def step_rows(self, step: int) -> tuple[tuple[int, int], ...]:
        """All (row, epoch) of a step over all ranks, in stream order."""
        start = step * self.rows_per_step
        return tuple(self.at(position) for position in range(start, start + self.rows_per_step))

    def halved(self) -> StepPlan:
        """The same steps in micro-batches of half the size (of one row, where it is odd)."""
        parts = 2 if self.micro_batch % 2 == 0 else self.micro_batch
        return replace(self, micro_batch=self.micro_batch // parts, micro_per_step=self.micro_per_step * parts)

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of `step` that `rank` computes."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} is not in a world of {self.world}")
        return [self.micro_batch_at(step, index) for index in range(rank, self.micro_per_step, self.world)]
