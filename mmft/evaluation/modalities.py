"""What each modality is worth to a model: its score without it, with it alone, with its rows shuffled, and its exact
Shapley value.

All that is asked of the model is `score(subset)`, the score when it sees only these modalities (the rest missing, as
`FusionModel`'s `present` says): a number, or the scores of single rows (N,) when the score is their mean (accuracy).
Then every figure is a mean over rows as well, and comes with its interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmft.errors import DataError
from mmft.evaluation.intervals import Interval, resampled_sums
from mmft.seeds import fold

MOST = 12
"""Modalities: 2^12 subsets are 4096 evaluations."""

Score = Callable[[frozenset[str]], float | np.ndarray]
ShuffledScore = Callable[[str], float | np.ndarray]


@dataclass(frozen=True, slots=True)
class ModalityWorth:
    """One modality's figures. `without`: the score when it is missing everywhere; `alone`: when all others are;
    `shuffled`: when its rows are dealt out anew (None if not asked for); `loss_without` and `loss_shuffled`: the full
    score minus these; `shapley`: see `shapley_values`. An interval's bounds are NaN and its n is 0 where the score was
    a plain number."""

    name: str
    without: Interval
    alone: Interval
    loss_without: Interval
    shapley: Interval
    shuffled: Interval | None = None
    loss_shuffled: Interval | None = None


@dataclass(frozen=True, slots=True)
class Worths:
    """The scores with all modalities and with none, and the modalities in their order."""

    full: Interval
    empty: Interval
    modalities: tuple[ModalityWorth, ...]


def shapley_values(names: Sequence[str], score: Score) -> dict[str, np.ndarray]:
    """Exact Shapley values (Shapley 1953): `phi_m = sum_S |S|! (M - |S| - 1)! / M! (v(S + m) - v(S))`, S without m.

    They add up to `v(all) - v(none)`. Shape of a value: that of the scores, () or (N,). Price: 2^M scores, each once.
    Raises DataError for no, too many or repeated modalities, and for scores that are not finite or differ in shape.
    """
    values = _all_scores(names, score)
    count = len(names)
    found = {}
    for name in names:
        total = np.zeros_like(values[frozenset()])
        for subset, value in values.items():
            if name not in subset:
                share = math.factorial(len(subset)) * math.factorial(count - len(subset) - 1) / math.factorial(count)
                total = total + share * (values[subset | {name}] - value)
        found[name] = total
    return found


def modality_worths(
    names: Sequence[str],
    score: Score,
    *,
    shuffled: ShuffledScore | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Worths:
    """All figures. `shuffled(name)` scores the model with that modality's rows permuted (`shuffle_modality`).

    Price: 2^M scores, and M shuffled ones. Errors as `shapley_values`.
    """
    seen: dict[frozenset[str], float | np.ndarray] = {}

    def once(subset: frozenset[str]) -> float | np.ndarray:
        if subset not in seen:
            seen[subset] = score(subset)
        return seen[subset]

    phi = shapley_values(names, once)
    values = _all_scores(names, once)
    everything = frozenset(names)
    full = values[everything]

    def interval(figure: np.ndarray) -> Interval:
        return _interval(figure, resamples=resamples, seed=seed)

    rows = []
    for name in names:
        without = values[everything - {name}]
        mixed = None if shuffled is None else _checked(shuffled(name), f"{name} shuffled", like=full)
        rows.append(
            ModalityWorth(
                name=name,
                without=interval(without),
                alone=interval(values[frozenset({name})]),
                loss_without=interval(full - without),
                shapley=interval(phi[name]),
                shuffled=None if mixed is None else interval(mixed),
                loss_shuffled=None if mixed is None else interval(full - mixed),
            )
        )
    return Worths(interval(full), interval(values[frozenset()]), tuple(rows))


def keep_modalities(batch: Mapping[str, Any], subset: Collection[str]) -> dict[str, Any]:
    """A batch of the fusion processor in which only the modalities of `subset` are present."""
    present = {name: there & (name in subset) for name, there in batch["present"].items()}
    return {**batch, "present": present}


def shuffle_modality(batch: Mapping[str, Any], name: str, *, seed: int) -> dict[str, Any]:
    """A batch (of a whole set, or the shuffle stays within batches) whose modality `name` is dealt out anew, presence
    and all: a cyclic permutation drawn from `seed` (Sattolo 1986), so that no row keeps its own. The batch must have at
    least two rows (DataError)."""
    rows = len(batch["present"][name])
    if rows < 2:
        raise DataError("one row cannot be shuffled", where=name, do="give all rows of the set at once")
    rng = np.random.default_rng(fold(seed, "shuffle", name))
    order = np.arange(rows)
    for last in range(rows - 1, 0, -1):
        other = int(rng.integers(0, last))
        order[[last, other]] = order[[other, last]]
    index = order.tolist()
    modalities = dict(batch["modalities"])
    if name in modalities:
        modalities[name] = {key: value[index] for key, value in modalities[name].items()}
    return {"modalities": modalities, "present": {**batch["present"], name: batch["present"][name][index]}}


def _all_scores(names: Sequence[str], score: Score) -> dict[frozenset[str], np.ndarray]:
    if not 1 <= len(names) <= MOST or len(set(names)) != len(names):
        raise DataError(
            f"modalities {', '.join(names) or 'none'}",
            allowed=f"1 to {MOST} different ones",
            do="join some of them into one",
        )
    values: dict[frozenset[str], np.ndarray] = {}
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            like = values.get(frozenset())
            values[frozenset(chosen)] = _checked(score(frozenset(chosen)), "+".join(chosen) or "no modality", like=like)
    return values


def _checked(value: float | np.ndarray, where: str, *, like: np.ndarray | None) -> np.ndarray:
    found = np.asarray(value, dtype=np.float64)
    if found.ndim > 1 or found.size == 0 or not np.isfinite(found).all():
        raise DataError(
            f"a score of shape {found.shape} that is not finite throughout",
            where=where,
            allowed="one finite number, or one per row",
            do="choose a score that is defined without some modalities",
        )
    if like is not None and found.shape != like.shape:
        raise DataError(f"{found.shape} scores where others have {like.shape}", where=where, do="score the same rows")
    return found


def _interval(figure: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """95 % percentile interval of a mean over rows; no bounds for a plain number."""
    if figure.ndim == 0:
        return Interval(float(figure), float("nan"), float("nan"), 0)
    sums = resampled_sums(figure[:, None], resamples=resamples, seed=seed)[:, 0] / len(figure)
    low, high = np.percentile(sums, (2.5, 97.5))
    return Interval(float(figure.mean()), float(low), float(high), len(figure))
