"""What learning from preferences did: win rate over the base judged by the true answer, and which answers are likelier.

A row is won when the model's own answer is right and the base's wrong, lost the other way round, else half won; the
base's win rate is therefore 0.5. Right means equal to the row's reference (the better answer). `preference_accuracy`:
the share of pairs whose better answer is the likelier one, per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmft.data.preference_render import PreferenceBatch, PreferenceRenderer
from mmft.data.sample import Sample
from mmft.evaluation.metrics import find_metric
from mmft.evaluation.scores import score_values

HEADLINE = "win_rate"


@torch.no_grad()
def answer_values(
    renderer: PreferenceRenderer,
    samples: Sequence[Sample],
    run: Callable[[PreferenceBatch], Tensor],
    *,
    batch_size: int,
    place: Callable[[PreferenceBatch], PreferenceBatch],
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """`run`'s number of every candidate of every sample, in their order."""
    found: list[list[float]] = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        batch = renderer.assemble([(sample, 0) for sample in chosen])
        values = run(place(batch)).float().tolist()
        rows: list[list[float]] = [[0.0] * len(sample.candidates) for sample in chosen]
        for value, owner, rank in zip(values, batch.owner.tolist(), batch.rank.tolist(), strict=True):
            rows[owner][rank] = value
        found += rows
        if progress is not None:
            progress(len(chosen))
    return found


def score_preferences(
    records: Sequence[Mapping[str, Any]],
    likelier: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    models: Sequence[str],
    metrics: Sequence[str],
    group_by: Sequence[str] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`headline`, `scores` and `sets` of the report.

    `records` are those of a `PredictionStore`; `likelier[SET][MODEL]` is 1, 0 for each pair of a set of pairs (sets of
    plain conversations have none). Without a base among the models there is no win rate.
    """
    sets = {}
    for name in dict.fromkeys(row["set"] for row in records):
        rows = [row for row in records if row["set"] == name]
        values = {model: _columns(rows, model, metrics, base="base" in models) for model in models}
        for model, column in likelier.get(name, {}).items():
            values[model]["preference_accuracy"] = np.asarray(column, dtype=np.float64)
        sets[name] = score_values(
            name,
            values,
            [row["tags"] for row in rows],
            group_by=group_by,
            bootstrap_samples=bootstrap_samples,
            seed=seed,
        )
    headline = HEADLINE if "base" in models else metrics[0]
    return {"headline": headline, "scores": next(iter(sets.values()))["scores"], "sets": sets}


def _columns(
    rows: Sequence[Mapping[str, Any]], model: str, metrics: Sequence[str], *, base: bool
) -> dict[str, np.ndarray]:
    references = [row["references"] for row in rows]

    def each(name: str, which: str) -> np.ndarray:
        metric = find_metric(name)
        return metric.each(metric.rows([row["answers"][which] for row in rows], references))

    won = {HEADLINE: (1.0 + each("exact_match", model) - each("exact_match", "base")) / 2.0} if base else {}
    return {**won, **{name: each(name, model) for name in metrics}}
