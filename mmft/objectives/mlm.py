"""Masked language modelling on texts with their pictures (ViLT, Kim et al. 2021, arXiv 2102.03334, 3.2).

Formula: `sum over hidden tokens of -log softmax(logits at its place)[token]`, over their number. What is hidden is
chosen by `data.masked`. For models whose head reads text and picture together: `ViltForMaskedLM`,
`BridgeTowerForMaskedLM`, `FlavaForPreTraining` (its multimodal text head).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.render import IGNORED
from mmft.errors import BackboneError
from mmft.objectives.base import Loss, by_source
from mmft.objectives.contrastive_embed import unwrapped

FLAVA = "FlavaForPreTraining"
MODELS = ("ViltForMaskedLM", "BridgeTowerForMaskedLM", FLAVA)


def check_masked(model: nn.Module) -> str:
    """The class name of a model with a masked head that sees pictures. Raises BackboneError for any other."""
    name = type(unwrapped(model)).__name__
    if name in MODELS:
        return name
    regions = name.startswith(("VisualBert", "Lxmert"))
    raise BackboneError(
        f"{name} takes features of a detector's regions, no pictures"
        if regions
        else f"{name} has no masked language modelling head that sees pictures",
        where="objective.name: mlm",
        allowed=", ".join(MODELS),
        do="take one of them; the folder's config.json names the class in `architectures`",
    )


def masked_logits(model: nn.Module, inputs: Mapping[str, Tensor], *, kind: str) -> Tensor:
    """(B, T, vocabulary) by the model's own forward; `model` may be wrapped for distribution."""
    called: Any = model
    if kind != FLAVA:
        return called(**inputs).logits
    given = {key: value for key, value in inputs.items() if key in ("pixel_values", "attention_mask", "token_type_ids")}
    ids = inputs["input_ids"]
    return called(
        input_ids=ids, input_ids_masked=ids, skip_unmasked_multimodal_encoder=True, return_loss=False, **given
    ).mmm_text_logits


def masked_nats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(nats, hits) of the hidden tokens, in the order of `labels != IGNORED`; float32 or wider."""
    hidden = labels != IGNORED
    scores, wanted = logits[hidden], labels[hidden]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(scores, wanted, reduction="none"), scores.detach().argmax(-1) == wanted


class MaskedObjective:
    """Cross-entropy of the hidden tokens; batches are those of `MaskedRenderer`."""

    name = "mlm"
    metrics = {"masked_accuracy": ("correct", "count")}

    def __init__(self, model: nn.Module) -> None:
        self.kind = check_masked(model)

    def count(self, batch: Batch) -> int:
        """Hidden tokens."""
        return batch.supervised

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """One forward; `logs["correct"]` counts tokens found."""
        nats, hits = masked_nats(masked_logits(model, batch.inputs, kind=self.kind), batch.labels)
        return Loss(sum=nats.sum(), count=batch.supervised, logs={"correct": hits.sum()} | by_source(nats, batch))
