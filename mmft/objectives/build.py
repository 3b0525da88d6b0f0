"""Recipe section → objective."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmft.errors import BackboneError
from mmft.objectives.base import Objective
from mmft.objectives.contrastive import ContrastiveObjective
from mmft.objectives.sft import SftObjective
from mmft.recipe.schema import ObjectiveSection


def build_objective(section: ObjectiveSection, model: nn.Module) -> Objective:
    """The objective named in the recipe, bound to the model: `sft` to its vocabulary head.

    Raises BackboneError when the model has no output embeddings, or for `contrastive` is no dual encoder.
    """
    if section.name == "contrastive":
        return ContrastiveObjective(model, kind=section.loss)
    unwrap: Any = getattr(model, "get_base_model", None)  # a PeftModel hides the accessor
    base: Any = model if unwrap is None else unwrap()
    head = base.get_output_embeddings()
    if head is None:
        raise BackboneError(
            f"{type(base).__name__} has no output embeddings",
            where="objective.name: sft",
            allowed="a generative model (AutoModelForImageTextToText)",
            do="choose another model",
        )
    return SftObjective(head=head, label_smoothing=section.label_smoothing_factor, ahead=_virtual_tokens(model))


def _virtual_tokens(model: Any) -> int:
    """Tokens that prompt tuning puts before the text (a prefix goes into the cache and adds no state)."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.peft_type == "PROMPT_TUNING" else 0
