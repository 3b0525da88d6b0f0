"""Classification, ordinal and regression losses of a fusion model: `FusionModel` computes them (`fusion.heads`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.fused import nested
from mmft.errors import BackboneError
from mmft.fusion.config import FusionConfig
from mmft.fusion.heads import IGNORED, count_of, counts_of, decide
from mmft.objectives.base import Loss, by_source


class ClassificationObjective:
    """The loss of the model's own head with its auxiliary losses; the count is the head's (`heads.count_of`).

    Logs how many decisions were right. Raises BackboneError for another kind of model.
    """

    name = "classification"
    metrics: Mapping[str, tuple[str, str]] = {"batch_accuracy": ("correct", "decisions")}

    def __init__(self, model: Any) -> None:
        unwrap = getattr(model, "get_base_model", None)
        config = (model if unwrap is None else unwrap()).config
        if not isinstance(config, FusionConfig):
            raise BackboneError(
                f"{type(config).__name__} is no fusion model",
                where="objective.name: classification",
                allowed="model.encoders, or the folder of a fusion model",
                do="name the encoders in model.encoders",
            )
        self.config = config

    def count(self, batch: Batch) -> int:
        """`heads.count_of`."""
        return count_of(self.config, batch.labels)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """One forward."""
        out = model(**nested(batch.inputs), labels=batch.labels)
        parts = by_source(out.row_losses, batch, counts=counts_of(self.config, batch.labels))
        return Loss(out.loss_sum, int(out.loss_count), self._logs(out.logits.detach(), batch.labels) | parts)

    def _logs(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Right decisions, and how many were made; for regression both are 0."""
        if self.config.task == "regression":
            return {"correct": logits.new_zeros(()), "decisions": logits.new_zeros(())}
        found = decide(self.config, logits)
        known = ~torch.isnan(labels) if labels.is_floating_point() else labels != IGNORED
        right = (found == (labels > 0.5 if self.config.task == "multi_label" else labels)) & known
        return {"correct": right.sum().float(), "decisions": known.sum().float()}
