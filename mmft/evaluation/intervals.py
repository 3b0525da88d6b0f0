"""Bootstrap intervals over rows, and paired tests of two models on the same rows.

All draws are made once per set of rows and shared by every model and metric, so paired differences and plain
intervals come from the same resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from mmft.evaluation.metrics.base import RowMetric

_LEVEL = (2.5, 97.5)
# Entries of the weight matrix held at once: 4 M float64 are 32 MB.
_CHUNK = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A score, its 95 % interval, and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Difference:
    """`first - second` on the same rows: 95 % interval, two-sided bootstrap p, exact McNemar p for 0/1 metrics."""

    metric: str
    difference: float
    low: float
    high: float
    p: float
    n: int
    mcnemar_p: float | None = None

    def as_dict(self) -> dict[str, float | int | str | None]:
        """JSON form."""
        return asdict(self)


def resampled_sums(stats: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Sums of the rows of `stats` (N, K) over `resamples` draws of N rows with replacement: (resamples, K).

    A draw is a vector of row counts, so the sums are one matrix product: O(resamples · N · K), 32 MB at a time.
    """
    rows = len(stats)
    rng = np.random.default_rng(seed)
    out = np.empty((resamples, stats.shape[1]))
    step = max(1, _CHUNK // max(1, rows))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        picks = rng.integers(0, rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        counts = np.bincount(picks.ravel(), minlength=size * rows).reshape(size, rows)
        out[start : start + size] = counts.astype(np.float64) @ stats
    return out


def interval(metric: RowMetric, stats: np.ndarray, sums: np.ndarray) -> Interval:
    """Percentile interval (Efron 1979) of `metric` on `stats` (N, K), given its resampled sums (R, K)."""
    value = metric.aggregate(stats)
    low, high = np.percentile(metric.finish(sums, len(stats)), _LEVEL)
    return Interval(value, float(low), float(high), len(stats))


def difference(
    metric: RowMetric, first: np.ndarray, second: np.ndarray, *, first_sums: np.ndarray, second_sums: np.ndarray
) -> Difference:
    """Paired bootstrap of `first - second`; the two sums must come from the same draws.

    p = 2 min(#{d* <= 0}, #{d* >= 0}) with one added to count and total (Davison & Hinkley 1997, 4.11), at most 1.
    """
    rows = len(first)
    drawn = metric.finish(first_sums, rows) - metric.finish(second_sums, rows)
    low, high = np.percentile(drawn, _LEVEL)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(
        metric=metric.name,
        difference=metric.aggregate(first) - metric.aggregate(second),
        low=float(low),
        high=float(high),
        p=min(1.0, 2.0 * (tail + 1) / (len(drawn) + 1)),
        n=rows,
        mcnemar_p=mcnemar(first[:, 0], second[:, 0]) if metric.binary else None,
    )


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided McNemar p (McNemar 1947): a fair coin over the rows on which the two 0/1 columns differ."""
    wins, losses = int((first > second).sum()), int((first < second).sum())
    total = wins + losses
    if total == 0:
        return 1.0
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, total + 1)))))
    k = np.arange(min(wins, losses) + 1)
    logs = log_factorial[total] - log_factorial[k] - log_factorial[total - k] - total * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(logs).sum()))


def bootstrap_interval(metric: RowMetric, stats: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """Interval of one model by itself; `stats` (N, K) with N >= 1."""
    return interval(metric, stats, resampled_sums(stats, resamples=resamples, seed=seed))


def paired_bootstrap(
    metric: RowMetric, first: np.ndarray, second: np.ndarray, *, resamples: int, seed: int
) -> Difference:
    """Difference of two models on the same rows, both (N, K)."""
    if first.shape != second.shape:
        raise ValueError(f"paired rows must have one shape, not {first.shape} and {second.shape}")
    sums = resampled_sums(np.concatenate((first, second), axis=1), resamples=resamples, seed=seed)
    width = first.shape[1]
    return difference(metric, first, second, first_sums=sums[:, :width], second_sums=sums[:, width:])
