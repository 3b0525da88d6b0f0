"""Rules of the objective section: what the other objective reads, and what a contrastive run cannot do."""

from __future__ import annotations

from mmft.recipe.check_online import ONLINE_RULES
from mmft.recipe.objective import ObjectiveSection, readers
from mmft.recipe.objective.joint import weights_of
from mmft.recipe.rules import Rule
from mmft.recipe.schema import COMPOSED, Recipe, Section

_MATCHING = ("contrastive", "joint", "dual")
"""Objectives that tell the rows of a step from each other."""
_PAIRED = (*_MATCHING, "mlm")
"""Objectives that learn from pairs."""


def _paired(recipe: Recipe) -> bool:
    return recipe.objective.name in _PAIRED


def _fused(recipe: Recipe) -> bool:
    return recipe.objective.name == "classification"


def _rows(recipe: Recipe) -> int:
    section = recipe.train
    return section.effective_batch_size or section.per_device_train_batch_size * section.gradient_accumulation_steps


def told(section: Section, name: str) -> bool:
    """Whether a field has another value than its default; the recipe of a run folder spells out the defaults too."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _unread(name: str) -> Rule:
    by = readers(name)
    return Rule(
        f"objective.{name}",
        (f"objective.{name}", "objective.name"),
        lambda r: r.objective.name not in by and told(r.objective, name),
        f"objective.{name}: {{objective.name}} does not read it",
        f"take it out, or set objective.name: {' or '.join(by)}",
    )


FUSION_READS_NOT = (
    "data.system",
    "data.supervise",
    "evaluate.max_new_tokens",
    "evaluate.num_beams",
    "evaluate.top_p",
    "evaluate.temperature",
)
"""Fields of conversations and of written answers."""


def _not_fused(field: str) -> Rule:
    section, _, name = field.partition(".")
    return Rule(
        field,
        (field, "objective.name"),
        lambda r: _fused(r) and told(getattr(r, section), name),
        f"{field}: a classification run writes no text and reads no conversations",
        "take it out",
    )


OBJECTIVE_RULES: tuple[Rule, ...] = (
    *ONLINE_RULES,
    *(_unread(name) for name in ObjectiveSection.model_fields if name != "name"),
    Rule(
        "objective.name",
        ("objective.name", "train.per_device_train_batch_size", "train.effective_batch_size"),
        lambda r: r.objective.name in _MATCHING and _rows(r) < 2,
        "objective.name: {objective.name} with one row in a step: there is nothing to tell it from",
        "set train.per_device_train_batch_size or train.effective_batch_size; hundreds of rows are usual",
        "2 rows or more in a step",
    ),
    Rule(
        "evaluate.metrics",
        ("evaluate.metrics", "objective.name"),
        lambda r: r.objective.name == "contrastive" and told(r.evaluate, "metrics"),
        "evaluate.metrics: a contrastive run is scored by retrieval (R@1, R@5, R@10, mAP, median rank)",
        "take it out",
    ),
    Rule(
        "evaluate.metrics",
        ("evaluate.metrics", "objective.name"),
        lambda r: r.objective.name == "mlm" and told(r.evaluate, "metrics"),
        "evaluate.metrics: an mlm run is scored by the accuracy and perplexity of hidden tokens",
        "take it out",
    ),
    Rule(
        "objective.joint_weights",
        ("objective.joint_weights", "objective.name"),
        lambda r: r.objective.name == "dual" and "matching" in r.objective.joint_weights,
        "objective.joint_weights: dual learning has no matching term",
        "take it out, or set objective.name: joint",
        "contrastive, caption",
    ),
    Rule(
        "objective.joint_weights",
        ("objective.joint_weights", "objective.name"),
        lambda r: (
            r.objective.name in ("joint", "dual")
            and not any(weights_of(r.objective.name, r.objective.joint_weights).values())
        ),
        "objective.joint_weights: every term weighs 0, so nothing is learned",
        "give one of them a weight",
    ),
    Rule(
        "evaluate.group_by",
        ("evaluate.group_by", "objective.name"),
        lambda r: _paired(r) and bool(r.evaluate.group_by),
        "evaluate.group_by: scores of a run on pairs are not split by tags",
        "take it out, or make an evaluation set of each group",
    ),
    Rule(
        "adapter.init_lora_weights",
        ("adapter.init_lora_weights", "objective.name"),
        lambda r: _paired(r) and r.adapter.init_lora_weights == "eva",
        "adapter.init_lora_weights: eva looks at batches of conversations, and objective.name is {objective.name}",
        "choose another start",
    ),
    Rule(
        "evaluate.top_p",
        ("evaluate.top_p", "evaluate.num_beams"),
        lambda r: r.evaluate.top_p is not None and r.evaluate.num_beams > 1,
        "evaluate.top_p with evaluate.num_beams {evaluate.num_beams}: a beam does not draw",
        "take one of them out",
    ),
    Rule(
        "evaluate.temperature",
        ("evaluate.temperature", "evaluate.top_p"),
        lambda r: r.evaluate.top_p is None and told(r.evaluate, "temperature"),
        "evaluate.temperature: nothing is drawn, so it does nothing",
        "set evaluate.top_p (1.0 draws from all tokens), or take it out",
    ),
    Rule(
        "adapter.method",
        ("adapter.method", "objective.name"),
        lambda r: r.objective.name == "captioning" and r.adapter.method in ("prompt", "prefix"),
        "adapter.method: {adapter.method} has no place in a captioner: its decoder is not a language model's",
        "choose lora or another method that changes layers",
    ),
    Rule(
        "adapter.method",
        ("adapter.method", "objective.name"),
        lambda r: _paired(r) and r.adapter.method in ("prompt", "prefix"),
        "adapter.method: {adapter.method} puts vectors before a language model's text; a dual encoder has none",
        "choose lora or another method that changes layers",
    ),
    # A temperature without top_p is refused for every objective.
    *(_not_fused(field) for field in FUSION_READS_NOT if field != "evaluate.temperature"),
    Rule(
        "model.encoders",
        ("model.encoders", "objective.name"),
        lambda r: bool(r.model.encoders) and not _fused(r),
        "model.encoders: {objective.name} does not read it",
        "take it out, or set objective.name: classification",
    ),
    Rule(
        "model.encoders",
        ("model.encoders", "model.name_or_path"),
        lambda r: _fused(r) and bool(r.model.encoders) and r.model.name_or_path != COMPOSED,
        "model.name_or_path and model.encoders: two answers to what is trained",
        "take one of them out",
    ),
    Rule(
        "evaluate.metrics",
        ("evaluate.metrics", "objective.name"),
        lambda r: _fused(r) and told(r.evaluate, "metrics"),
        "evaluate.metrics: classification is scored by its task (accuracy to calibration; mae, rmse, r2)",
        "take it out",
    ),
    Rule(
        "adapter.init_lora_weights",
        ("adapter.init_lora_weights", "objective.name"),
        lambda r: _fused(r) and r.adapter.init_lora_weights == "eva",
        "adapter.init_lora_weights: eva looks at batches of conversations, and objective.name is classification",
        "choose another start",
    ),
    Rule(
        "adapter.method",
        ("adapter.method", "objective.name"),
        lambda r: _fused(r) and r.adapter.method in ("prompt", "prefix"),
        "adapter.method: {adapter.method} puts vectors before a language model's text; an encoder has no such place",
        "choose lora or another method that changes layers",
    ),
    Rule(
        "objective.balance",
        ("objective.balance", "objective.task"),
        lambda r: _fused(r) and r.objective.task in ("regression", "multi_label") and r.objective.balance != "none",
        "objective.balance: {objective.balance} needs one class per row, and task is {objective.task}",
        "take it out",
    ),
    Rule(
        "objective.classes",
        ("objective.classes", "objective.task"),
        lambda r: _fused(r) and r.objective.task == "regression" and bool(r.objective.classes),
        "objective.classes: a number has no classes, and task is regression",
        "take it out",
    ),
)
