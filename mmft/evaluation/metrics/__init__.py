"""Metrics by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmft.errors import RecipeError, choices
from mmft.evaluation.metrics.base import RowMetric
from mmft.evaluation.metrics.bleu import Bleu
from mmft.evaluation.metrics.cider import Cider
from mmft.evaluation.metrics.exact_match import ExactMatch
from mmft.evaluation.metrics.meteor import Meteor
from mmft.evaluation.metrics.rouge_l import RougeL
from mmft.evaluation.metrics.token_f1 import TokenF1
from mmft.evaluation.metrics.vqa_accuracy import VqaAccuracy

if TYPE_CHECKING:
    import evaluate

METRICS: dict[str, RowMetric] = {
    metric.name: metric
    for metric in (
        ExactMatch(),
        VqaAccuracy(),
        TokenF1(),
        Cider(),
        Bleu(),
        *(Bleu(order) for order in (1, 2, 3)),
        RougeL(),
        Meteor(),
    )
}


def find_metric(name: str) -> RowMetric:
    """The metric called `name`; RecipeError with the nearest name otherwise."""
    if name not in METRICS:
        raise RecipeError(
            f"no metric is called '{name}'",
            where="evaluate.metrics",
            allowed=choices(METRICS, word=name),
            do="use one of the allowed names",
        )
    return METRICS[name]


def load_metric(name: str) -> evaluate.Metric:
    """The metric as a hub-free `evaluate.Metric` (imports `evaluate`, which takes seconds; keeps rows in memory): of
    texts, or of classes and numbers (`classification_modules`)."""
    from mmft.evaluation.metrics.classification_modules import CLASS_MODULES
    from mmft.evaluation.metrics.huggingface import MODULES

    if name in CLASS_MODULES:
        return CLASS_MODULES[name](keep_in_memory=True)
    find_metric(name)
    return MODULES[name](keep_in_memory=True)


__all__ = ["METRICS", "RowMetric", "find_metric", "load_metric"]
