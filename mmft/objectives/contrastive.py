"""Contrastive learning of pairs: symmetric InfoNCE and the pairwise sigmoid loss, several captions, hard negatives.

A row's *group* says what belongs together: a picture and a text are a positive pair when their groups are equal. A
row of group `EXTRA` belongs to nothing: it is a hard negative, one more column for the other side. With similarities
s = <x, y> of vectors of length one, scale t, bias b and P(i) the texts of picture i:

- `infonce` (Radford et al. 2021, arXiv 2103.00020; several positives as L_out of Khosla et al. 2020, arXiv
  2004.11362): half of the mean over pictures of `-1/|P(i)| sum over j in P(i) of log softmax_j(t s_ij)`, and half of
  the same from the texts' side.
- `sigmoid` (Zhai et al. 2023, arXiv 2303.15343): `-1/pictures * sum over all (i, j) of log sigmoid(z_ij (t s_ij + b))`,
  z = 1 for positive pairs and -1 for others.

The loss looks at a whole optimizer step at once, over all micro-batches and ranks (`contrastive_cached`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.pairs import EXTRA, LEFT, RIGHT
from mmft.errors import BackboneError, DataError
from mmft.objectives.base import Loss, StepContext
from mmft.objectives.contrastive_cached import cached_step
from mmft.objectives.contrastive_embed import (
    Terms,
    clamp_scales,
    embed,
    logit_terms,
    scales,
    sides,
    similarity,
    unwrapped,
)

__all__ = ["EXTRA", "LEFT", "RIGHT", "ContrastiveObjective", "Kind", "clamp_scales", "contrastive_loss", "embed"]
Kind = Literal["infonce", "sigmoid"]


def contrastive_loss(
    left: Tensor, right: Tensor, *, left_groups: Tensor, right_groups: Tensor, terms: Terms, kind: Kind = "infonce"
) -> Loss:
    """Loss of embeddings of length one, `left` (n, width) and `right` (m, width) with groups (n,) and (m,).

    `sum / count` is the loss of the module's docstring, `count` the rows of `left` that belong to a group, and
    `logs["correct"]` counts those whose nearest text is one of theirs; `each` (n,) is a picture's share of the sum: its
    own terms, and those of its texts (evenly, where they have several pictures). In float32 (float64 if given so).
    Price: the matrix of n * m similarities, once for each direction. Raises DataError when a group of `left` has no
    text or one of `right` no picture.
    """
    similar = similarity(left, right)
    positive = (left_groups[:, None] == right_groups[None, :]) & (left_groups != EXTRA)[:, None]
    _check_pairs(positive, left_groups, right_groups)
    count = int((left_groups != EXTRA).sum())
    logits = similar * terms.left
    if kind == "infonce":
        from_left, _ = _direction(logits, positive)
        from_right, texts = _direction(similar.T * terms.right, positive.T)
        total = (from_left.mean() + from_right.mean()) * (count / 2)
        each = similar.new_zeros(len(left)).masked_scatter(positive.any(1), from_left.detach() / len(from_left))
        each = (each + (from_right.detach() / len(from_right)) @ texts) * (count / 2)
    else:
        sign = positive.to(similar.dtype) * 2 - 1
        terms_of = -F.logsigmoid(sign * (logits + terms.bias))
        total, each = terms_of.sum(), terms_of.detach().sum(1)
    best = logits.detach().argmax(dim=1, keepdim=True)
    return Loss(total, count, {"correct": positive.gather(1, best).sum()}, each)


def _direction(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row that has a positive column, spread evenly over its positives, and those shares."""
    rows = positive.any(dim=1)
    weight = positive[rows].to(logits.dtype)
    shares = weight / weight.sum(1, keepdim=True)
    return -(F.log_softmax(logits[rows], dim=1) * weight).sum(1) / weight.sum(1), shares


def _check_pairs(positive: Tensor, left_groups: Tensor, right_groups: Tensor) -> None:
    for groups, paired, what, other in (
        (left_groups, positive.any(1), "picture", "text"),
        (right_groups, positive.any(0), "text", "picture"),
    ):
        alone = (groups != EXTRA) & ~paired
        if bool(alone.any()) or not bool((groups != EXTRA).any()):
            raise DataError(
                f"{int(alone.sum())} rows of the {what}s belong to a group without a {other}"
                if bool(alone.any())
                else f"no {what} belongs to a pair",
                where=f"{LEFT}, {RIGHT}",
                allowed=f"the same groups on both sides; {EXTRA} for hard negatives",
                do="give every row a picture and a text",
            )


class ContrastiveObjective:
    """InfoNCE or the sigmoid loss over the pairs of an optimizer step.

    Batches hold the inputs of both sides and the groups of each picture (`LEFT`) and text (`RIGHT`), int64.
    Raises BackboneError for a model that is no dual encoder, and for `sigmoid` with one that has no `logit_bias`.
    """

    name = "contrastive"
    metrics = {"batch_accuracy": ("correct", "count")}

    def __init__(self, model: nn.Module, *, kind: Kind = "infonce") -> None:
        self.left, self.right = sides(model)
        self.kind: Kind = kind
        if kind == "sigmoid" and "logit_bias" not in scales(model):
            raise BackboneError(
                f"the sigmoid loss needs a bias, and {type(unwrapped(model)).__name__} has no logit_bias",
                where="objective.loss: sigmoid",
                allowed="SigLIP and SigLIP 2 have one; give_bias(model) puts one on any other",
                do="write objective.loss: infonce, or call give_bias on the model",
            )

    def count(self, batch: Batch) -> int:
        """Pictures (or sounds) of the batch that belong to a pair."""
        return int((batch.inputs[LEFT] != EXTRA).sum())

    def embeddings(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(left, right) embeddings of one batch's inputs."""
        return embed(model, inputs, self.left), embed(model, inputs, self.right)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of one batch by itself: only its own rows are negatives."""
        left, right = self.embeddings(model, batch.inputs)
        return self.matched(model, left, right, batch.inputs[LEFT], batch.inputs[RIGHT])

    def matched(self, model: nn.Module, left: Tensor, right: Tensor, left_groups: Tensor, right_groups: Tensor) -> Loss:
        """The loss of embeddings, with the model's own scale and bias."""
        return contrastive_loss(
            left, right, left_groups=left_groups, right_groups=right_groups, terms=logit_terms(model), kind=self.kind
        )

    def backward(self, model: nn.Module, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
        """Gradients of the whole step's loss into the trained parameters; this rank's share of the sums.

        Equal to one large batch over all micro-batches and ranks, at the memory of one micro-batch.
        """
        return cached_step(self, model, micros, step)

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """After an update: the scale stays at or below 100."""
        clamp_scales(weights)


def give_bias(model: nn.Module, value: float = -10.0) -> nn.Parameter:
    """Put a `logit_bias` on a dual encoder that has none, for the sigmoid loss; -10 is the start of Zhai et al. 2023.

    Ranks do not depend on it, and plain transformers does not know it: it is not part of a saved model.
    """
    base = unwrapped(model)
    if "logit_bias" not in scales(base):
        like = next(iter(scales(base).values()))
        base.register_parameter("logit_bias", nn.Parameter(torch.full_like(like.detach().float(), value)))
    return scales(base)["logit_bias"]
