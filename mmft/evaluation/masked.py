"""Evaluation of masked language modelling: how many hidden tokens are found, and how surprising they are.

`masked_accuracy = found / hidden`, `perplexity = exp(nats / hidden)`; 95 % intervals by drawing rows. What is hidden
is that of epoch 0, the same for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mmft.data.masked import MaskedRenderer
from mmft.data.render import IGNORED
from mmft.data.sample import Sample
from mmft.evaluation.intervals import difference, interval, resampled_sums
from mmft.evaluation.metrics.base import RowMetric
from mmft.evaluation.scores import PAIRS
from mmft.objectives.mlm import check_masked, masked_logits, masked_nats
from mmft.seeds import fold

HEADLINE = "masked_accuracy"


class _PerToken(RowMetric):
    """A ratio of sums over hidden tokens; rows are statistics (value, hidden tokens)."""

    def __init__(self, name: str, *, exponential: bool) -> None:
        self.name, self.exponential, self.higher_is_better = name, exponential, not exponential

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Not of texts. Raises TypeError."""
        raise TypeError(f"{self.name} is taken from logits, not from texts")

    def finish(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """Sum over count, or its exponential."""
        means = sums[..., 0] / sums[..., 1]
        return np.exp(means) if self.exponential else means


METRICS = (_PerToken(HEADLINE, exponential=False), _PerToken("perplexity", exponential=True))


@torch.no_grad()
def masked_rows(
    model: nn.Module,
    renderer: MaskedRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """(rows, 3): hidden tokens found, their nats, their number. The model is put into eval() and back."""
    was_training, first, kind = model.training, next(model.parameters()), check_masked(model)
    model.eval()
    found = np.zeros((len(samples), 3))
    try:
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            batch = renderer.assemble([(sample, 0) for sample in chosen]).to(first.device)
            inputs = {
                key: value.to(first.dtype) if value.is_floating_point() else value
                for key, value in batch.inputs.items()
            }
            nats, hits = masked_nats(masked_logits(model, inputs, kind=kind), batch.labels)
            rows = (batch.labels != IGNORED).nonzero()[:, 0].cpu().numpy() + start
            for column, values in enumerate((hits, nats, torch.ones_like(nats))):
                np.add.at(found[:, column], rows, values.double().cpu().numpy())
            if progress is not None:
                progress(len(chosen))
    finally:
        model.train(was_training)
    return found


def score_masked(found: Mapping[str, Mapping[str, np.ndarray]], *, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """`headline`, `scores` and `sets` of the report from `masked_rows` by model and set; all models of a set are
    resampled by the same draws."""
    names = next(iter(found.values())).keys()
    sets = {
        name: _score_set(
            {model: rows[name] for model, rows in found.items()},
            resamples=bootstrap_samples,
            seed=fold(seed, "masked", name),
        )
        for name in names
    }
    return {"headline": HEADLINE, "scores": next(iter(sets.values()))["scores"], "sets": sets}


def _score_set(models: Mapping[str, np.ndarray], *, resamples: int, seed: int) -> dict[str, Any]:
    drawn = {model: resampled_sums(rows, resamples=resamples, seed=seed) for model, rows in models.items()}

    def columns(values: np.ndarray, place: int) -> np.ndarray:
        return values[:, [place, 2]]

    scores = {
        model: {
            metric.name: interval(metric, columns(rows, place), columns(drawn[model], place)).as_dict()
            for place, metric in enumerate(METRICS)
        }
        for model, rows in models.items()
    }
    paired: dict[str, Any] = {}
    for first, second in PAIRS:
        if {first, second} <= models.keys():
            metrics = {
                metric.name: difference(
                    metric,
                    columns(models[first], place),
                    columns(models[second], place),
                    first_sums=columns(drawn[first], place),
                    second_sums=columns(drawn[second], place),
                ).as_dict()
                for place, metric in enumerate(METRICS)
            }
            paired[f"{first}-{second}"] = {**metrics[HEADLINE], "metrics": metrics}
    return {"rows": len(next(iter(models.values()))), "scores": scores, "paired": paired, "groups": {}}
