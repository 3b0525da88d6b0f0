"""The order of rows that are read as they come: arithmetic in constant memory, whatever the number of rows.

A pass over a set takes its files in an order of its own, `together` at a time; of these, chunks of `CHUNK` rows are
shuffled (a keyed Feistel network, so no list of them exists), and of each `BLOCK` rows behind one another the order is
drawn anew. Where sets are mixed, their rows lie evenly in the epoch and are then shuffled within `WINDOW` places. All
of it is a function of (seed, epoch, place) and of the files' row counts: a run resumes by its step number alone.
Price: memory for one number a file, and three tables of at most `BLOCK` numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mmft.data.order import StepPlan
from mmft.seeds import fold

CHUNK = 64
BLOCK = 64 * CHUNK
WINDOW = 1024
_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def scattered(place: int, count: int, key: int) -> int:
    """Where a permutation of `range(count)` that `key` names puts `place`: a Feistel network over the next power of
    four, walked until it is back in the range (Black and Rogaway 2002). O(1), no table."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(_mixed(key + number) ^ right) & low)
        place = (left << half) | right
        if place < count:
            return place


@lru_cache(maxsize=8)
def _permutation(count: int, key: int) -> np.ndarray:
    found = np.random.Generator(np.random.PCG64(key)).permutation(count)
    found.setflags(write=False)
    return found


@dataclass(frozen=True, eq=False)
class StreamSet:
    """One set of a stream: rows of every file, and how many files are shuffled into each other (0: all)."""

    sizes: tuple[int, ...]
    together: int = 0

    @cached_property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of every file."""
        return np.concatenate(([0], np.cumsum(self.sizes)[:-1]))

    def at(self, place: int, *, seed: int, number: int) -> int:
        """The row at a place of the endless stream of this set's passes; `number` tells sets apart."""
        turn, place = divmod(place, self.rows)
        order, ends, groups = _files(self, seed, number, turn)
        group = int(np.searchsorted(groups, place, side="right"))
        first = int(groups[group - 1]) if group else 0
        size, place = int(groups[group]) - first, place - first
        key = fold(seed, "stream", number, turn, group)
        block, within = divmod(place, BLOCK)
        place = block * BLOCK + int(_permutation(min(BLOCK, size - block * BLOCK), key ^ (block + 1))[within])
        chunk, within = divmod(place, CHUNK)
        whole = size // CHUNK  # the last chunk may be short, and then stays where it is
        place = first + (scattered(chunk, whole, key) if chunk < whole else chunk) * CHUNK + within
        at = int(np.searchsorted(ends, place, side="right"))
        file = int(order[at])
        return int(self.starts[file]) + place - (int(ends[at - 1]) if at else 0)


@lru_cache(maxsize=32)
def _files(part: StreamSet, seed: int, number: int, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one pass: the files in their order, where the rows of each end, where those of each group end."""
    order = np.random.Generator(np.random.PCG64(fold(seed, "stream files", number, turn))).permutation(len(part.sizes))
    ends = np.cumsum(np.array(part.sizes)[order])
    step = part.together or len(order)
    return order, ends, ends[[min(at + step, len(order)) - 1 for at in range(0, len(order), step)]]


def mixed(place: int, draws: Sequence[int]) -> tuple[int, int]:
    """(set, how many of its rows came before) at a place of an epoch that takes `draws` rows of each set, evenly: of
    the first p places floor(p d / n) are of the first set, of the rest likewise the next. O(sets)."""
    left = sum(draws)
    for number, count in enumerate(draws):
        before = place * count // left
        if (place + 1) * count // left > before:
            return number, before
        place, left = place - before, left - count
    raise ValueError("the place lies beyond the epoch")


@dataclass(frozen=True, slots=True)
class StreamPlan(StepPlan):
    """A `StepPlan` over sets that stand behind one another, of which an epoch takes `draws` rows each."""

    sets: tuple[StreamSet, ...] = ()
    draws: tuple[int, ...] = ()

    def at(self, position: int) -> tuple[int, int]:
        """(row, epoch) at a position of the stream."""
        epoch, place = divmod(position, self.rows)
        number = 0
        if len(self.sets) > 1:
            window, within = divmod(place, WINDOW)
            key = fold(self.seed, "stream mixture", epoch, window)
            place = window * WINDOW + int(_permutation(min(WINDOW, self.rows - window * WINDOW), key)[within])
            number, place = mixed(place, self.draws)
        own = self.sets[number].at(epoch * self.draws[number] + place, seed=self.seed, number=number)
        return sum(one.rows for one in self.sets[:number]) + own, epoch
