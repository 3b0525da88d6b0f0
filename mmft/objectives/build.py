"""The objective of conversations, bound to its model."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmft.errors import BackboneError
from mmft.objectives.sft import SftObjective
from mmft.recipe.schema import ObjectiveSection


def build_sft(section: ObjectiveSection, model: nn.Module) -> SftObjective:
    """`sft` bound to the model's vocabulary head. Raises BackboneError when the model has no output embeddings."""
    head = output_head(model, where=f"objective.name: {section.name}")
    return SftObjective(head=head, label_smoothing=section.label_smoothing_factor, ahead=virtual_tokens(model))


def output_head(model: nn.Module, *, where: str) -> nn.Module:
    """The output embeddings, also below a PeftModel. Raises BackboneError when there are none."""
    unwrap: Any = getattr(model, "get_base_model", None)  # a PeftModel hides the accessor
    base: Any = model if unwrap is None else unwrap()
    head = base.get_output_embeddings()
    if head is None:
        raise BackboneError(
            f"{type(base).__name__} has no output embeddings",
            where=where,
            allowed="a generative model (AutoModelForImageTextToText)",
            do="choose another model",
        )
    return head


def virtual_tokens(model: Any) -> int:
    """Tokens that prompt tuning puts before the text (a prefix goes into the cache and adds no state)."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.peft_type == "PROMPT_TUNING" else 0
