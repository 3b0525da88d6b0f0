"""How often each data set comes in an epoch: repeats, weights, temperature; a pure function of (seed, epoch).

With n_i rows in set i and d_i draws of it in an epoch, epoch e takes the positions [e d_i, (e + 1) d_i) of the endless
stream of the set's own shuffled passes. So no row of a set comes twice more often than another, whatever the weights,
and nothing depends on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from mmft.data.sample import Sample
from mmft.errors import RecipeError
from mmft.recipe.schema import DataSource
from mmft.seeds import fold


@dataclass(frozen=True, slots=True)
class Mixture:
    """Rows and draws of every set, in the order in which the rows stand behind each other."""

    sizes: tuple[int, ...]
    draws: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Draws of one epoch."""
        return sum(self.draws)

    def indices(self, *, seed: int, epoch: int) -> np.ndarray:
        """Which rows an epoch takes, set after set and not shuffled yet; int64 of shape (rows,)."""
        start, parts = 0, []
        for number, (size, count) in enumerate(zip(self.sizes, self.draws, strict=True)):
            own = np.arange(size) if size == count else self._stretch(number, size, count, seed=seed, epoch=epoch)
            parts.append(start + own)
            start += size
        return np.concatenate(parts)

    @staticmethod
    def _stretch(number: int, size: int, count: int, *, seed: int, epoch: int) -> np.ndarray:
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // size, -(-last // size))
        stream = [
            np.random.Generator(np.random.PCG64(fold(seed, "mixture", number, one))).permutation(size) for one in passes
        ]
        offset = first - passes.start * size
        return np.concatenate(stream)[offset : offset + count] if count else np.zeros(0, dtype=np.int64)


def mixture_of(
    samples: Sequence[Sample], sources: Sequence[DataSource], names: Sequence[str], *, temperature: float
) -> Mixture | None:
    """The mixture that a recipe asks for; None where every row comes once in an epoch.

    `repeat`: d_i = repeat n_i. `weight`: d_i in proportion to the weights, `temperature` T: to n_i^(1/T); both with as
    many draws in all as there are rows. Raises RecipeError for sets of one name that differ in these.
    """
    wanted: dict[str, DataSource] = {}
    for source, name in zip(sources, names, strict=True):
        other = wanted.setdefault(name, source)
        if (other.weight, other.repeat) != (source.weight, source.repeat):
            raise RecipeError(
                f"two training sets are called '{name}' and differ in weight or repeat",
                where="data.train[].name",
                do="give them names of their own",
            )
    sizes = [(name, len(list(group))) for name, group in groupby(samples, key=lambda sample: sample.source)]
    if not sizes:
        return None
    given = [wanted[name] for name, _ in sizes if name in wanted]
    if len(given) < len(sizes):  # rows that were made of others
        return None
    counts = tuple(size for _, size in sizes)
    draws = draws_of(counts, given, temperature=temperature)
    return None if draws == counts else Mixture(counts, draws)


def draws_of(counts: Sequence[int], sources: Sequence[DataSource], *, temperature: float) -> tuple[int, ...]:
    """Rows that an epoch takes of each set of `counts` rows; see `mixture_of`."""
    if any(source.weight is not None for source in sources):
        shares = [source.weight or 0.0 for source in sources]
    elif temperature != 1.0:
        shares = [size ** (1.0 / temperature) for size in counts]
    else:
        return tuple(max(1, round(source.repeat * size)) for source, size in zip(sources, counts, strict=True))
    return largest_remainder(shares, sum(counts))


def largest_remainder(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """`total` split in proportion to `shares` into whole numbers, by the method of largest remainders."""
    exact = [total * share / math.fsum(shares) for share in shares]
    floors = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda at: (floors[at] - exact[at], at))
    for at in order[: total - sum(floors)]:
        floors[at] += 1
    return tuple(floors)
