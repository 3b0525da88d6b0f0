"""Classification metrics by name, their bootstrap intervals, and paired comparisons on the same rows.

The draws are those of `mmft.evaluation.intervals`: equal seed and number of rows, equal resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from mmft.errors import RecipeError, choices
from mmft.evaluation.intervals import Difference, Interval, mcnemar, resampled_sums
from mmft.evaluation.metrics.classification import (
    Accuracy,
    Answers,
    Averaged,
    BalancedAccuracy,
    CalibrationError,
    ClassMetric,
    LogLoss,
    QuadraticKappa,
)
from mmft.evaluation.metrics.classification_ranks import (
    R2,
    MeanAbsoluteError,
    PrAuc,
    RocAuc,
    RootMeanSquaredError,
)

CLASS_METRICS: dict[str, ClassMetric] = {
    metric.name: metric
    for metric in (
        Accuracy(),
        BalancedAccuracy(),
        *(Averaged(average, kind) for average in ("macro", "micro") for kind in ("precision", "recall", "f1")),
        RocAuc(),
        PrAuc(),
        LogLoss(),
        CalibrationError(),
        QuadraticKappa(),
        MeanAbsoluteError(),
        RootMeanSquaredError(),
        R2(),
    )
}
"""Metrics of classes (`classify`), and of numbers (`measure`: mae, rmse, r2)."""
_LEVEL = (2.5, 97.5)
_COLUMNS = 512
"""Columns of a wide statistic that are resampled at once."""


@dataclass(frozen=True, slots=True)
class ClassInterval(Interval):
    """An interval, and how many of the draws had no defined score (a draw may miss a class altogether)."""

    undefined: int

    def as_dict(self) -> dict[str, float | int]:
        """JSON form."""
        return asdict(self)


def find_class_metric(name: str) -> ClassMetric:
    """The metric called `name`; RecipeError with the nearest name otherwise."""
    if name not in CLASS_METRICS:
        raise RecipeError(
            f"no classification metric is called '{name}'",
            allowed=choices(CLASS_METRICS, word=name),
            do="use one of the allowed names",
        )
    return CLASS_METRICS[name]


def class_interval(name: str, answers: Answers, *, resamples: int = 1000, seed: int = 0) -> ClassInterval:
    """The score with its 95 % percentile interval over rows (Efron 1979)."""
    metric = find_class_metric(name)
    drawn = _drawn(metric, answers, resamples=resamples, seed=seed)
    known = drawn[~np.isnan(drawn)]
    low, high = np.percentile(known, _LEVEL) if len(known) else (np.nan, np.nan)
    lost = len(drawn) - len(known)
    return ClassInterval(metric.score(answers), float(low), float(high), len(answers.truth), lost)


def class_difference(name: str, first: Answers, second: Answers, *, resamples: int = 1000, seed: int = 0) -> Difference:
    """`first - second` on the same rows: paired bootstrap as in `intervals.difference`; draws in which either is
    undefined are left out. Raises ValueError when the references differ."""
    if not np.array_equal(first.truth, second.truth):
        raise ValueError("paired answers must have the same references in the same order")
    metric = find_class_metric(name)
    drawn = _drawn(metric, first, resamples=resamples, seed=seed) - _drawn(
        metric, second, resamples=resamples, seed=seed
    )
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, _LEVEL) if len(drawn) else (np.nan, np.nan)
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    exact = mcnemar(metric.stats(first)[:, 0], metric.stats(second)[:, 0]) if metric.binary else None
    value = metric.score(first) - metric.score(second)
    p = min(1.0, 2.0 * (tail + 1) / (len(drawn) + 1))
    return Difference(name, value, float(low), float(high), p=p, n=len(first.truth), mcnemar_p=exact)


def _drawn(metric: ClassMetric, answers: Answers, *, resamples: int, seed: int) -> np.ndarray:
    """The score of every draw. Blocks of columns draw alike, because each starts from the seed."""
    stats = metric.stats(answers)
    blocks = [
        resampled_sums(stats[:, at : at + _COLUMNS], resamples=resamples, seed=seed)
        for at in range(0, stats.shape[1], _COLUMNS)
    ]
    return metric.finish(np.concatenate(blocks, axis=1), len(stats), answers)
