"""Classification, ordinal and regression losses of a fusion model: `FusionModel` computes them (`fusion.heads`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmft.data.collate import Batch
from mmft.data.fused import nested
from mmft.errors import BackboneError
from mmft.fusion.config import FusionConfig
from mmft.fusion.heads import count_of, decide
from mmft.objectives.base import Loss


class ClassificationObjective:
    """The loss of the model's own head with its auxiliary losses; the count is the head's (`heads.count_of`).

    Logs the sum of correct decisions (the squared error for regression has no such thing: 0). Raises BackboneError for
    another kind of model.
    """

    name = "classification"

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
        return Loss(out.loss_sum, int(out.loss_count), {"correct": self._correct(out.logits.detach(), batch.labels)})

    def _correct(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.task == "regression":
            return logits.new_zeros(())
        found = decide(self.config, logits)
        if self.config.task == "multi_label":
            return (found == (labels > 0.5)).sum().float()
        return (found == labels).sum().float()
