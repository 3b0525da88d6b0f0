"""The objective section: one group of fields for each thing an objective reads, and which objective reads which.

A field that the chosen objective does not read is an error when it is given, so a user meets the fields of one
objective only.
"""

from __future__ import annotations

from typing import Literal

from mmft.recipe.objective.captioning import CaptioningFields
from mmft.recipe.objective.classification import ClassificationFields
from mmft.recipe.objective.contrastive import ContrastiveFields, SimilarityFields
from mmft.recipe.objective.joint import DualFields, JointFields
from mmft.recipe.objective.online import GroupFields, RolloutFields, ValueFields
from mmft.recipe.objective.pairs import PairFields
from mmft.recipe.objective.preference import PREFERENCE_READS, PreferenceFields
from mmft.recipe.objective.sft import SmoothingFields
from mmft.recipe.section import Section

READS: dict[str, tuple[type[Section], ...]] = {
    "sft": (SmoothingFields,),
    "contrastive": (PairFields, SimilarityFields, ContrastiveFields),
    "captioning": (SmoothingFields, PairFields, CaptioningFields),
    "classification": (SmoothingFields, ClassificationFields),
    "joint": (PairFields, SimilarityFields, JointFields),
    "dual": (PairFields, SimilarityFields, JointFields, DualFields),
    "mlm": (),
    "grpo": (RolloutFields, GroupFields),
    "rloo": (RolloutFields,),
    "ppo": (RolloutFields, ValueFields),
    **PREFERENCE_READS,
}
"""Objective -> the groups of fields it reads."""


class ObjectiveSection(
    SmoothingFields,
    PairFields,
    SimilarityFields,
    ContrastiveFields,
    CaptioningFields,
    ClassificationFields,
    JointFields,
    DualFields,
    RolloutFields,
    GroupFields,
    ValueFields,
    PreferenceFields,
):
    """What is minimised."""

    name: Literal[
        "sft",
        "contrastive",
        "captioning",
        "classification",
        "joint",
        "dual",
        "mlm",
        "grpo",
        "rloo",
        "ppo",
        "reward",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "cpo",
    ] = "sft"
    """`sft`: cross-entropy of the answers' tokens; `contrastive`: pictures and texts of a dual encoder; `captioning`:
    cross-entropy of the captions of an encoder-decoder, or of a decoder that sees the picture; `classification`: labels
    of rows with pictures, texts, sounds, videos and columns of a table; `joint`: contrastive, matching and captioning
    heads together; `dual`: picture to text and text to picture tied by consistency; `mlm`: hidden words of texts with
    pictures; `grpo`, `rloo`, `ppo`: reinforcement learning on answers that the model samples; `reward`: a number
    for an answer; `dpo`, `orpo`, `simpo`, `cpo`: pairs of answers; `kto`: thumbs."""


def readers(field: str) -> list[str]:
    """The objectives that read a field of the section."""
    return [name for name, groups in READS.items() if any(field in group.model_fields for group in groups)]
