"""From prediction records to scores: per set, per group, and paired between models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mmft.errors import DataError
from mmft.evaluation.intervals import difference, interval, resampled_sums
from mmft.evaluation.metrics import RowMetric, find_metric
from mmft.seeds import fold

UNTAGGED = "(untagged)"
PAIRS = (("adapter", "base"), ("merged", "adapter"), ("merged", "base"))
Stats = Mapping[tuple[str, str], np.ndarray]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is the same for all groups of all sets."""

    models: tuple[str, ...]
    metrics: tuple[RowMetric, ...]
    resamples: int
    seed: int


def score_records(
    records: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    metrics: Sequence[str],
    *,
    group_by: Sequence[str] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`headline` (the first metric), `scores` (first set, all rows) and `sets` of the report.

    Groups: `sets[SET]["groups"][TAG][VALUE]` has `rows`, `scores` and `paired` as the set itself; each pair of tags is
    crossed as `groups["TAG1,TAG2"]["TAG1=VALUE1,TAG2=VALUE2"]`. Rows without a tag count as "(untagged)".
    `paired["adapter-base"]` holds the headline metric's difference and all metrics' under "metrics". Every draw is a
    pure function of seed, set and group. Raises DataError when there are no records or a model has not answered a row.
    """
    job = _Job(tuple(models), tuple(find_metric(name) for name in metrics), bootstrap_samples, seed)
    _check(records, job)
    names = dict.fromkeys(record["set"] for record in records)
    sets = {name: _score_set(name, [row for row in records if row["set"] == name], group_by, job=job) for name in names}
    return {"headline": job.metrics[0].name, "scores": next(iter(sets.values()))["scores"], "sets": sets}


class _Mean(RowMetric):
    """The mean of numbers that were made elsewhere."""

    def __init__(self, name: str, *, binary: bool) -> None:
        self.name, self.binary = name, binary

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Not asked: the numbers are given."""
        raise NotImplementedError


def score_values(
    name: str,
    values: Mapping[str, Mapping[str, np.ndarray]],
    tags: Sequence[Mapping[str, str]],
    *,
    group_by: Sequence[str] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """A set's entry of `sets` from one number a row: `values[MODEL][METRIC]` (N,), the first metric first.

    Means, intervals, groups and paired differences as in `score_records`; every model has the same metrics.
    """
    first = next(iter(values.values()))
    every = {metric: np.concatenate([one[metric] for one in values.values()]) for metric in first}
    metrics = tuple(_Mean(metric, binary=bool(np.isin(every[metric], (0.0, 1.0)).all())) for metric in first)
    job = _Job(tuple(values), metrics, bootstrap_samples, seed)
    stats = {
        (model, metric): np.asarray(one[metric], dtype=np.float64).reshape(-1, 1)
        for model, one in values.items()
        for metric in first
    }
    return _score_stats(name, stats, [{"tags": dict(one)} for one in tags], group_by, job=job)


def _check(records: Sequence[Mapping[str, Any]], job: _Job) -> None:
    if not records or not job.models or not job.metrics:
        raise DataError(
            f"nothing to score: {len(records)} rows, {len(job.models)} models, {len(job.metrics)} metrics",
            where="data.eval, evaluate.models, evaluate.metrics",
            do="name at least one evaluation set, model and metric",
        )
    for record in records:
        missing = [model for model in job.models if model not in record["answers"]]
        if missing:
            raise DataError(
                f"no answer of {', '.join(missing)}",
                where=f"set {record['set']}, row {record['id']}",
                do="generate answers of all models on the same rows",
            )


def _score_set(name: str, rows: Sequence[Mapping[str, Any]], group_by: Sequence[str], *, job: _Job) -> dict[str, Any]:
    references = [row["references"] for row in rows]
    stats = {
        (model, metric.name): metric.rows([row["answers"][model] for row in rows], references)
        for model in job.models
        for metric in job.metrics
    }
    return _score_stats(name, stats, rows, group_by, job=job)


def _score_stats(
    name: str, stats: Stats, rows: Sequence[Mapping[str, Any]], group_by: Sequence[str], *, job: _Job
) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for tag, values in _groupings(rows, group_by):
        groups[tag] = {}
        for value in sorted(set(values)):
            chosen = np.asarray([one == value for one in values])
            part = {key: stat[chosen] for key, stat in stats.items()}
            groups[tag][value] = _score_rows(part, job=job, seed=fold(job.seed, "bootstrap", name, tag, value))
    return {**_score_rows(stats, job=job, seed=fold(job.seed, "bootstrap", name)), "groups": groups}


def _groupings(rows: Sequence[Mapping[str, Any]], group_by: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """(tag, value per row) for each tag, then for each pair of tags."""
    columns = {tag: [str(row["tags"].get(tag, UNTAGGED)) for row in rows] for tag in group_by}
    yield from columns.items()
    for one, other in combinations(columns, 2):
        both = zip(columns[one], columns[other], strict=True)
        yield f"{one},{other}", [f"{one}={left},{other}={right}" for left, right in both]


def _score_rows(stats: Stats, *, job: _Job, seed: int) -> dict[str, Any]:
    """`rows`, `scores` by model and metric, `paired` differences of some rows, all from the same draws."""
    keys = list(stats)
    drawn = resampled_sums(np.concatenate([stats[key] for key in keys], axis=1), resamples=job.resamples, seed=seed)
    ends = np.cumsum([stats[key].shape[1] for key in keys])
    sums = dict(zip(keys, np.split(drawn, ends[:-1], axis=1), strict=True))
    scores = {
        model: {
            metric.name: interval(metric, stats[model, metric.name], sums[model, metric.name]).as_dict()
            for metric in job.metrics
        }
        for model in job.models
    }
    paired: dict[str, Any] = {}
    for first, second in PAIRS:
        if first in job.models and second in job.models:
            found = {metric.name: _compare(metric, first, second, stats=stats, sums=sums) for metric in job.metrics}
            paired[f"{first}-{second}"] = {**found[job.metrics[0].name], "metrics": found}
    return {"rows": len(stats[keys[0]]), "scores": scores, "paired": paired}


def _compare(metric: RowMetric, first: str, second: str, *, stats: Stats, sums: Stats) -> dict[str, Any]:
    one, other = (first, metric.name), (second, metric.name)
    found = difference(metric, stats[one], stats[other], first_sums=sums[one], second_sums=sums[other])
    return found.as_dict()
