"""Objectives over answers to one prompt: DPO and its kin, KTO, ORPO, SimPO, CPO; losses in `preference_losses.py`.

The reference is the model with its adapter off (or a table), so there is no second copy of the weights. Gradients
reach the policy through the answers' tokens only: prompt, pictures and padding carry no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.preference_render import PreferenceBatch
from mmft.errors import DataError
from mmft.objectives import preference_losses as losses
from mmft.objectives.base import Loss, by_source
from mmft.objectives.preference_forward import answer_logps
from mmft.objectives.preference_losses import Pair
from mmft.objectives.reference import Run, placed

Name = Literal["dpo", "kto", "orpo", "simpo", "cpo"]
WITHOUT_REFERENCE = ("orpo", "simpo", "cpo")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of the objective's section a loss reads; see `mmft/recipe/objective/preference.py`."""

    name: Name = "dpo"
    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    image_weight: float = 0.0
    gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def pair_loss(pair: Pair, settings: Settings) -> Tensor:
    """The loss of each pair, (B,), image terms apart."""
    if settings.name == "orpo":
        return losses.orpo(pair, settings.beta)
    if settings.name == "simpo":
        return losses.simpo(pair, settings.beta, settings.gamma)
    if settings.name == "cpo":
        found = losses.cpo(pair, settings.beta)
    else:
        found = losses.DPO_LOSSES[settings.loss_type](pair, settings.beta, settings.label_smoothing)
    return found + settings.sft_weight * losses.nll(pair.chosen, pair.chosen_length) if settings.sft_weight else found


class PreferenceObjective:
    """One forward of both answers to each prompt; with a reference a second one without gradient.

    `head` is the model's output embeddings, `ahead` the virtual tokens before the text, `dtype` the type of its
    weights. `reference` gives log q.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        head: nn.Module,
        reference: Run | None,
        dtype: torch.dtype = torch.float32,
        ahead: int = 0,
    ) -> None:
        self.settings, self.head, self.ahead, self.dtype = settings, head, ahead, dtype
        self.reference = reference
        self.name: str = settings.name
        self.metrics = {name: (name, "count") for name in ("preference_accuracy", "reward_margin", "chosen_reward")}
        if settings.name == "kto":
            self.metrics = {
                "good_reward": ("good_sum", "good"),
                "bad_reward": ("bad_sum", "bad"),
                "kl": ("kl", "count"),
            }

    def count(self, batch: Batch) -> int:
        """Prompts of the batch."""
        return len(batch.ids)

    def logps(self, model: nn.Module, batch: PreferenceBatch) -> Tensor:
        """log p of every answer, (R,)."""
        return answer_logps(model, self.head, batch, ahead=self.ahead)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum over prompts of the loss of their two answers."""
        assert isinstance(batch, PreferenceBatch)
        if 2 * len(batch.ids) != len(batch.owner):
            raise DataError(
                f"{len(batch.owner)} answers to {len(batch.ids)} prompts", do="give pairs of answers (thumbs for kto)"
            )
        reference = self.reference(batch) if self.reference is not None else None  # before the graph is in memory
        policy = self.logps(model, batch)
        return (
            self._kto(policy, reference, batch) if self.name == "kto" else self._pairs(model, policy, reference, batch)
        )

    def _pairs(self, model: nn.Module, policy: Tensor, reference: Tensor | None, batch: PreferenceBatch) -> Loss:
        size, settings = len(batch.ids), self.settings
        against = torch.zeros_like(policy) if reference is None else reference
        lengths = batch.lengths.to(policy)
        pair = Pair(policy[:size], policy[size:], against[:size], against[size:], lengths[:size], lengths[size:])
        each = pair_loss(pair, settings)
        better, worse = pair.ratios
        if batch.altered is not None:
            each = each + self._image_terms(model, better, placed(batch.altered, self.dtype, policy.device))
        if self.name == "simpo":
            better, worse = pair.normalised().ratios
        better, worse = settings.beta * better.detach(), settings.beta * worse.detach()
        logs = {
            "preference_accuracy": (better > worse).sum(),
            "reward_margin": (better - worse).sum(),
            "chosen_reward": better.sum(),
        }
        return Loss(sum=each.sum(), count=size, logs=logs | by_source(each, batch))

    def _image_terms(self, model: nn.Module, better: Tensor, altered: PreferenceBatch) -> Tensor:
        assert self.reference is not None
        against = self.reference(altered)
        ratio = self.logps(model, altered) - against
        terms = losses.conditional(better, ratio, self.settings.beta) + losses.anchor(better, self.settings.beta)
        return self.settings.image_weight * terms

    def _kto(self, policy: Tensor, reference: Tensor | None, batch: PreferenceBatch) -> Loss:
        """The first answer of a prompt is the thumbed one (score 1 or 0), the second another prompt's."""
        assert reference is not None
        size, settings = len(batch.ids), self.settings
        ratio = policy - reference
        kl = losses.kto_kl(ratio[size:])
        good = batch.score[:size].to(ratio.device) > 0
        weights = (settings.desirable_weight, settings.undesirable_weight)
        each = losses.kto(ratio[:size], good, kl, settings.beta, weights)
        reward = settings.beta * ratio[:size].detach()
        logs = {
            "good": good.sum(),
            "bad": (~good).sum(),
            "good_sum": reward[good].sum(),
            "bad_sum": reward[~good].sum(),
            "kl": kl * size,
        }
        return Loss(sum=each.sum(), count=size, logs=logs | by_source(each, batch))
