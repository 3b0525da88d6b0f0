"""The metrics as `evaluate.Metric` classes that need no hub: `ExactMatchMetric().compute(predictions=…, references=…)`.

In a file of their own because importing `evaluate` takes seconds and scoring a run does not need it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import evaluate

from mmft.evaluation.metrics.base import RowMetric
from mmft.evaluation.metrics.bleu import Bleu
from mmft.evaluation.metrics.cider import Cider
from mmft.evaluation.metrics.exact_match import ExactMatch
from mmft.evaluation.metrics.meteor import Meteor
from mmft.evaluation.metrics.rouge_l import RougeL
from mmft.evaluation.metrics.token_f1 import TokenF1
from mmft.evaluation.metrics.vqa_accuracy import VqaAccuracy


class _RowMetricModule(evaluate.Metric):
    """`references` are a list of texts per prediction, or one text per prediction."""

    metric: ClassVar[RowMetric]

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self.metric).__doc__ or "",
            citation="",
            inputs_description="predictions: list of texts. references: a list of texts per prediction, or one text.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, *, predictions: list[str], references: list[Any]) -> dict[str, float]:
        rows = [[row] if isinstance(row, str) else list(row) for row in references]
        return self.metric.score(predictions, rows)


class ExactMatchMetric(_RowMetricModule):
    """`evaluate` face of ExactMatch."""

    metric = ExactMatch()


class VqaAccuracyMetric(_RowMetricModule):
    """`evaluate` face of VqaAccuracy."""

    metric = VqaAccuracy()


class TokenF1Metric(_RowMetricModule):
    """`evaluate` face of TokenF1."""

    metric = TokenF1()


class CiderMetric(_RowMetricModule):
    """`evaluate` face of Cider."""

    metric = Cider()


class BleuMetric(_RowMetricModule):
    """`evaluate` face of Bleu."""

    metric = Bleu()


class Bleu1Metric(_RowMetricModule):
    """`evaluate` face of BLEU-1."""

    metric = Bleu(1)


class Bleu2Metric(_RowMetricModule):
    """`evaluate` face of BLEU-2."""

    metric = Bleu(2)


class Bleu3Metric(_RowMetricModule):
    """`evaluate` face of BLEU-3."""

    metric = Bleu(3)


class MeteorMetric(_RowMetricModule):
    """`evaluate` face of Meteor."""

    metric = Meteor()


class RougeLMetric(_RowMetricModule):
    """`evaluate` face of RougeL."""

    metric = RougeL()


MODULES: dict[str, type[_RowMetricModule]] = {
    module.metric.name: module
    for module in (
        ExactMatchMetric,
        VqaAccuracyMetric,
        TokenF1Metric,
        CiderMetric,
        BleuMetric,
        Bleu1Metric,
        Bleu2Metric,
        Bleu3Metric,
        RougeLMetric,
        MeteorMetric,
    )
}
