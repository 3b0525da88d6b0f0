"""Recipe section → objective."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmft.errors import BackboneError
from mmft.objectives.base import Objective
from mmft.objectives.sft import SftObjective
from mmft.recipe.schema import ObjectiveSection


def build_objective(section: ObjectiveSection, model: nn.Module) -> Objective:
    """The objective named in the recipe, bound to the model's vocabulary head.

    Raises BackboneError when the model has no output embeddings.
    """
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
    return SftObjective(head=head, label_smoothing=section.label_smoothing_factor)
