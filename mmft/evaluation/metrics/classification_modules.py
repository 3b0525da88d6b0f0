"""The classification metrics as `evaluate.Metric` classes that need no hub.

`load_class_metric("macro_f1").compute(predictions=[0, 2], references=[0, 1])`; predictions may be class numbers, or
a list of probabilities per row; with several labels per row both are a list per row. mae, rmse and r2 take numbers.
In a file of their own because importing `evaluate` takes seconds.
"""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import evaluate

from mmft.evaluation.metrics.classification import ClassMetric, classify, confusion_matrix
from mmft.evaluation.metrics.classification_intervals import CLASS_METRICS, find_class_metric
from mmft.evaluation.metrics.classification_ranks import measure

NUMBERS = frozenset({"mae", "rmse", "r2"})
"""Metrics of numbers instead of classes."""


class _ClassModule(evaluate.Metric):
    metric: ClassVar[ClassMetric | None]

    def _info(self) -> evaluate.MetricInfo:
        one, many = datasets.Value("float64"), datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=(type(self.metric).__doc__ if self.metric else confusion_matrix.__doc__) or "",
            citation="",
            inputs_description="predictions: class numbers or lists of probabilities. references: class numbers.",
            features=[
                datasets.Features({"predictions": one, "references": one}),
                datasets.Features({"predictions": many, "references": one}),
                datasets.Features({"predictions": many, "references": many}),
            ],
        )

    def _compute(self, *, predictions: Any, references: Any, classes: int | None = None) -> dict[str, Any]:
        if self.metric is None:
            return {"confusion_matrix": confusion_matrix(classify(predictions, references, classes=classes)).tolist()}
        if self.metric.name in NUMBERS:
            return {self.metric.name: self.metric.score(measure(predictions, references))}
        return {self.metric.name: self.metric.score(classify(predictions, references, classes=classes))}


CLASS_MODULES: dict[str, type[_ClassModule]] = {
    name: type(
        f"{type(metric).__name__}Module", (_ClassModule,), {"metric": metric, "__doc__": f"`evaluate` face of {name}."}
    )
    for name, metric in CLASS_METRICS.items()
}
CLASS_MODULES["confusion_matrix"] = type(
    "ConfusionMatrixModule", (_ClassModule,), {"metric": None, "__doc__": "`evaluate` face of `confusion_matrix`."}
)


def load_class_metric(name: str) -> evaluate.Metric:
    """The metric as a hub-free `evaluate.Metric`; RecipeError with the nearest name for an unknown one."""
    if name not in CLASS_MODULES:
        find_class_metric(name)
    return CLASS_MODULES[name](keep_in_memory=True)
