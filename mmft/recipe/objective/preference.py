"""What learning from preferences reads: pairs, thumbs and rankings of answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmft.recipe.section import Rate, Section

Weight = Annotated[float, Field(ge=0.0)]


class BetaFields(Section):
    """Fields of objectives that compare log-probabilities of answers."""

    beta: Rate = 0.1
    """How hard log-ratios are held to the reference; SimPO takes 2 to 2.5, in ORPO it weighs the odds term."""


class ReferenceFields(Section):
    """Fields of objectives with a reference model."""

    precompute_reference: bool = False
    """Reference log-probabilities once before training, kept on disk, instead of a forward with the adapter off in
    every step; the reference is then the model as training starts."""


class DpoFields(Section):
    """Fields of DPO's variants."""

    loss_type: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"
    """DPO, DPO on mean log-probabilities of an answer's tokens, SLiC's hinge, IPO, robust DPO, APO-zero, APO-down;
    formulas in mmft/objectives/preference_losses.py."""
    label_noise: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round (cDPO with `sigmoid`; `robust`)."""
    image_weight: Weight = 0.0
    """Weight of mDPO's two terms: the better answer must be likelier with its own picture than with a changed one, and
    may not become unlikelier than under the reference."""
    rejected_image: Literal["crop", "other"] = "crop"
    """The changed picture, of (seed, epoch, row): up to a fifth of it cut off, or the picture of another row."""


class SftMixFields(Section):
    """Fields of objectives with a supervised part."""

    sft_weight: Weight = 0.0
    """Weight of the better answer's own mean cross-entropy (RPO, CPO)."""


class KtoFields(Section):
    """Fields of KTO."""

    desirable_weight: Rate = 1.0
    """Weight of good answers."""
    undesirable_weight: Rate = 1.0
    """Weight of bad answers; weights times numbers of the two should be alike."""


class SimpoFields(Section):
    """Fields of SimPO."""

    gamma: Weight = 0.5
    """Margin between the rewards of the two answers."""


class RewardFields(Section):
    """Fields of reward models."""

    margin: bool = False
    """A pair's difference of scores is the margin of its rewards."""
    centre_weight: Weight = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps them around zero."""
    answer_weight: Weight = 0.0
    """Weight of the cross-entropy with which the state of each answer's last token must give the best answer's first
    token; without it a small model may not learn to tell right from wrong at all."""


PREFERENCE_READS: dict[str, tuple[type[Section], ...]] = {
    "reward": (RewardFields,),
    "dpo": (BetaFields, ReferenceFields, DpoFields, SftMixFields),
    "kto": (BetaFields, ReferenceFields, KtoFields),
    "orpo": (BetaFields,),
    "simpo": (BetaFields, SimpoFields),
    "cpo": (BetaFields, SftMixFields),
}
"""Objective -> the groups of fields it reads."""


class PreferenceFields(RewardFields, BetaFields, ReferenceFields, DpoFields, SftMixFields, KtoFields, SimpoFields):
    """All of them."""
