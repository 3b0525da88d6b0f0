"""Rules of objectives that learn from preferences: where a reference comes from, and what they cannot do."""

from __future__ import annotations

from mmft.recipe.methods import METHODS
from mmft.recipe.rules import Rule
from mmft.recipe.schema import Recipe

COMPARED = ("reward", "dpo", "kto", "orpo", "simpo", "cpo")
WITH_REFERENCE = ("dpo", "kto")


def _off_is_start(recipe: Recipe) -> bool:
    """Whether the model with its adapter off is the one that training starts from."""
    adapter = recipe.adapter
    switches = METHODS[adapter.method].peft is not None
    return switches and adapter.init_from is None and adapter.init_lora_weights in ("default", "eva")


def _is(recipe: Recipe, *names: str) -> bool:
    return recipe.objective.name in names


PREFERENCE_RULES: tuple[Rule, ...] = (
    Rule(
        "objective.precompute_reference",
        ("objective.precompute_reference", "adapter.method", "adapter.init_from", "adapter.init_lora_weights"),
        lambda r: _is(r, *WITH_REFERENCE) and not _off_is_start(r) and not r.objective.precompute_reference,
        "objective.precompute_reference: with this adapter section the model without its adapter is not the one that "
        "training starts from",
        "set objective.precompute_reference: true",
    ),
    Rule(
        "objective.precompute_reference",
        ("objective.precompute_reference", "objective.image_weight"),
        lambda r: _is(r, "dpo") and r.objective.precompute_reference and r.objective.image_weight > 0,
        "objective.precompute_reference: the changed pictures of image_weight are others in every epoch",
        "take one of the two out",
    ),
    Rule(
        "objective.loss_type",
        ("objective.loss_type", "objective.label_noise"),
        lambda r: _is(r, "dpo") and r.objective.label_noise > 0 and r.objective.loss_type not in ("sigmoid", "robust"),
        "objective.label_noise: loss_type {objective.loss_type} does not read it",
        "set loss_type: sigmoid (cDPO) or robust",
    ),
    Rule(
        "adapter.method",
        ("adapter.method", "objective.name"),
        lambda r: _is(r, "reward") and (METHODS[r.adapter.method].peft is None or r.adapter.method == "prefix"),
        "adapter.method: a reward head is kept beside an adapter, and {adapter.method} makes none",
        "choose lora",
    ),
    Rule(
        "data.over_length",
        ("data.over_length", "objective.name"),
        lambda r: _is(r, *COMPARED) and r.data.over_length == "truncate_text",
        "data.over_length: truncate_text would cut the question of two answers differently",
        "set error or drop",
    ),
    Rule(
        "evaluate.metrics",
        ("evaluate.metrics", "objective.name"),
        lambda r: _is(r, "reward") and r.evaluate.metrics != type(r.evaluate).model_fields["metrics"].default,
        "evaluate.metrics: a reward model is scored by the pairs it ranks rightly, its calibration, and length",
        "take it out",
    ),
    Rule(
        "data.supervise",
        ("data.supervise", "objective.name"),
        lambda r: _is(r, *COMPARED) and r.data.supervise != "answers",
        "data.supervise: answers that are compared always carry loss on the last turn alone",
        "take it out",
    ),
)
