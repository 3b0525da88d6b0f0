"""Retrieval in both directions: recall at 1, 5, 10, median rank and mean average precision, with intervals.

    found = retrieve(pictures, texts, left_groups=..., right_groups=...)     # embeddings of length one
    found["image_to_text"].scores["r@1"]                                     # Interval(value, low, high, n)

A query's answers are the rows of the other side with its group; rows of a group below 0 are no queries, they are
there to distract. The rank of an answer is 1 + the wrong rows that score as high or higher: **ties count against the
model** (one that says the same of everything finds nothing), and similarities equal to six decimals are a tie. R@k is
the share of queries with an answer at rank k or better, median rank that of the best answers, average precision
(Manning et al. 2008, 8.4) the mean over a query's answers of `answers at this rank or better / their place`, where
answers that tie share the last place.

Intervals are 95 % bootstrap intervals over *groups*: the captions of one picture are drawn together, because they
succeed and fail together. Price: two passes over n * m similarities in float64, `BLOCK` of them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmft.errors import DataError
from mmft.evaluation.intervals import Difference, Interval, difference, interval, resampled_sums
from mmft.evaluation.metrics.base import RowMetric
from mmft.seeds import fold

KS = (1, 5, 10)
BLOCK = 4_000_000
"""Similarities held at once: 32 MB of float64, and as much for what they are compared with."""
_DIGITS = 6
_LEVEL = (2.5, 97.5)


class RatioMetric(RowMetric):
    """A mean over queries whose rows are groups: (sum over the group's queries, their number)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Not of texts: statistics come from ranks. Raises TypeError."""
        raise TypeError(f"{self.name} is taken from ranks, not from texts")

    def finish(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """Sum over count."""
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Direction:
    """One direction's outcome. `ranks` (queries,) are the best answers' ranks, `precision` the queries' average
    precision, `groups` their groups; `scores` by name: `r@1`, `r@5`, `r@10`, `map`, `median_rank`."""

    ranks: np.ndarray
    precision: np.ndarray
    groups: np.ndarray
    candidates: int
    scores: Mapping[str, Interval]


def retrieve(
    left: Tensor,
    right: Tensor,
    *,
    left_groups: Sequence[int] | Tensor | None = None,
    right_groups: Sequence[int] | Tensor | None = None,
    names: tuple[str, str] = ("image", "text"),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Direction]:
    """`{"image_to_text": ..., "text_to_image": ...}` for `left` (n, width) and `right` (m, width) of length one.

    Without groups row i belongs to row i. Raises DataError for embeddings that are not finite, groups of the wrong
    number, a query without an answer, or no query at all.
    """
    groups = [_groups(left, left_groups, names[0]), _groups(right, right_groups, names[1])]
    sides = [left.detach().to("cpu", torch.float64), right.detach().to("cpu", torch.float64)]
    for values, name in zip(sides, names, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"embeddings of {name} are not finite", do="look at the run's loss")
    found = {}
    for one, other in ((0, 1), (1, 0)):
        key = f"{names[one]}_to_{names[other]}"
        found[key] = _direction(sides[one], sides[other], groups[one], groups[other], resamples=resamples, seed=seed)
    return found


def recall_at_one(
    left: Tensor, right: Tensor, *, left_groups: Sequence[int] | Tensor, right_groups: Sequence[int] | Tensor
) -> float:
    """R@1 from left to right without an interval, by the rules of `retrieve`: a few products, for use in training."""
    own, other = _groups(left, left_groups, "left"), _groups(right, right_groups, "right")
    asked = np.flatnonzero(own >= 0)
    answers = _answers(own[asked], other)
    queries, rows = (value.detach().to("cpu", torch.float64) for value in (left, right))
    wrong = _places(queries[torch.from_numpy(asked)], rows, answers)[0]
    return float((np.where(answers >= 0, wrong, 1).min(axis=1) == 0).mean())


def compare(first: Direction, second: Direction, *, resamples: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """Paired differences `first - second` of two models on the same queries, by score (median rank left out)."""
    if not np.array_equal(first.groups, second.groups):
        raise ValueError("the two models were not asked the same queries")
    out = {}
    for name in _columns(first):
        stats = [_by_group(_columns(one)[name], one.groups) for one in (first, second)]
        sums = resampled_sums(np.concatenate(stats, axis=1), resamples=resamples, seed=_seed(seed))
        out[name] = replace(
            difference(RatioMetric(name), *stats, first_sums=sums[:, :2], second_sums=sums[:, 2:]), n=len(first.ranks)
        )
    return out


def _groups(values: Tensor, groups: Sequence[int] | Tensor | None, name: str) -> np.ndarray:
    if groups is None:
        return np.arange(len(values))
    found = np.asarray(groups, dtype=np.int64)
    if len(found) != len(values):
        raise DataError(f"{len(found)} groups for {len(values)} rows of {name}", do="give one group for each row")
    return found


def _direction(
    queries: Tensor, rows: Tensor, own: np.ndarray, other: np.ndarray, *, resamples: int, seed: int
) -> Direction:
    asked = np.flatnonzero(own >= 0)
    answers = _answers(own[asked], other)
    places = _places(queries[torch.from_numpy(asked)], rows, answers)
    real = answers >= 0
    ranks = np.where(real, 1 + places[0], np.iinfo(np.int64).max).min(axis=1)
    # Place of an answer: wrong rows at or above it, and answers at or above it (itself among them).
    precision = np.where(real, places[1] / np.maximum(places[0] + places[1], 1), 0.0).sum(axis=1) / real.sum(axis=1)
    bare = Direction(ranks, precision, own[asked], len(rows), {})
    return replace(bare, scores=_scores(bare, resamples=resamples, seed=seed))


def _answers(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(queries, most answers) row numbers of the answers, -1 where a query has fewer."""
    order = np.argsort(other, kind="stable")
    ordered = other[order]
    start, stop = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    if not len(own) or (stop == start).any():
        alone = own[stop == start]
        raise DataError(
            f"{len(alone)} queries have no answer (the first: group {alone[0]})" if len(own) else "there is no query",
            do="give every row a partner, or group -1 to make it a distractor",
        )
    steps = start[:, None] + np.arange(int((stop - start).max()))[None, :]
    return np.where(steps < stop[:, None], order[np.minimum(steps, len(order) - 1)], -1)


def _places(queries: Tensor, rows: Tensor, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each answer (queries, answers): wrong rows that score as high or higher, and answers that do."""
    wrong, right = np.zeros(answers.shape, dtype=np.int64), np.zeros(answers.shape, dtype=np.int64)
    width = min(len(rows), 8192)
    height = max(1, BLOCK // max(width, rows.shape[1]))
    for top in range(0, len(queries), height):
        block, picked = queries[top : top + height], torch.from_numpy(answers[top : top + height])
        real = picked >= 0
        scores = torch.stack([(block * rows[one]).sum(-1) for one in picked.clamp(min=0).unbind(1)], dim=1)
        scores = scores.round(decimals=_DIGITS)
        scores = scores.masked_fill(~real, float("inf"))
        above = torch.zeros(picked.shape, dtype=torch.int64)
        for begin in range(0, len(rows), width):
            seen = (block @ rows[begin : begin + width].T).round(decimals=_DIGITS)
            for column in range(picked.shape[1]):
                above[:, column] += (seen >= scores[:, column : column + 1]).sum(1)
        among = torch.stack([((scores >= one[:, None]) & real).sum(1) for one in scores.unbind(1)], dim=1)
        wrong[top : top + height], right[top : top + height] = (above - among).numpy(), among.numpy()
    return wrong, right


def _columns(found: Direction) -> dict[str, np.ndarray]:
    """Score -> value of every query, for the scores that are means."""
    return {**{f"r@{k}": (found.ranks <= k).astype(np.float64) for k in KS}, "map": found.precision}


def _by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(groups, 2): sum and number of the queries of each group, groups in ascending order."""
    _, place = np.unique(groups, return_inverse=True)
    return np.stack([np.bincount(place, weights=values), np.bincount(place)], axis=1)


def _seed(seed: int) -> int:
    return fold(seed, "retrieval")


def _scores(found: Direction, *, resamples: int, seed: int) -> dict[str, Interval]:
    scores = {}
    for name, values in _columns(found).items():
        stats = _by_group(values, found.groups)
        sums = resampled_sums(stats, resamples=resamples, seed=_seed(seed))
        scores[name] = replace(interval(RatioMetric(name), stats, sums), n=len(values))
    scores["median_rank"] = _median(found.ranks, found.groups, resamples=resamples, seed=_seed(seed))
    return scores


def _median(ranks: np.ndarray, groups: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """Median of the ranks; the interval from the draws of groups that the other scores use."""
    kinds, place = np.unique(groups, return_inverse=True)
    order = np.argsort(ranks, kind="stable")
    ordered, owner = ranks[order], place[order]
    rng = np.random.default_rng(seed)
    medians = np.empty(resamples)
    for number in range(resamples):
        counts = np.bincount(rng.integers(0, len(kinds), size=len(kinds)), minlength=len(kinds))
        ends = np.cumsum(counts[owner])
        middle = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
        medians[number] = ordered[middle].mean()
    low, high = np.percentile(medians, _LEVEL)
    return Interval(float(np.median(ranks)), float(low), float(high), len(ranks))
