"""Rules of streamed sets: what cannot be done with rows that nobody looks at before their step."""

from __future__ import annotations

from collections.abc import Iterator

from mmft.recipe.ondisk import Finding
from mmft.recipe.schema import COMPOSED, Recipe

READS = (
    "data.train",
    "data.eval",
    "objective.name",
    "objective.balance",
    "objective.strategy",
    "objective.cache_features",
    "objective.precompute_reference",
    "objective.rejected_image",
    "objective.image_weight",
    "model.name_or_path",
    "train.train_sampling_strategy",
    "evaluate.class_tag",
)


def streams(recipe: Recipe) -> Iterator[Finding]:
    """Every rule that a streamed set breaks."""
    for index, source in enumerate(recipe.data.eval):
        if source.streaming:
            field = f"data.eval.{index}.streaming"
            yield Finding(field, f"{field}: evaluation sets are held in memory", "take it away, or take fewer rows")
    for index, source in enumerate(recipe.data.train):
        if source.streaming:
            field = f"data.train.{index}.streaming"
            if source.num_samples is not None:
                yield Finding(field, f"{field}: true with num_samples", "name fewer files, or give the set a weight")
            for reason, remedy in _held_first(recipe):
                yield Finding(field, f"{field}: true, but {reason}", remedy)


def _held_first(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(what needs all rows before the first step, what to do)."""
    objective = recipe.objective
    if recipe.train.train_sampling_strategy != "random":
        yield (
            "rows of a stream cannot be brought together by what they show",
            "set train.train_sampling_strategy: random",
        )
    if objective.precompute_reference:
        yield (
            "objective.precompute_reference looks at all rows first",
            "take it out: the reference is then computed in each step",
        )
    if objective.name == "dpo" and objective.image_weight and objective.rejected_image == "other":
        yield "objective.rejected_image: other draws from the pictures of all rows", "set it to crop"
    if recipe.evaluate.class_tag:
        yield (
            "evaluate.class_tag reads the classes off all training rows",
            "take it out",
        )
    if objective.name != "classification":
        return
    if recipe.model.name_or_path == COMPOSED:
        yield (
            "a base of model.encoders is composed of the classes and statistics of all rows",
            "train a few steps on rows that are held, and name base/ of that run folder as the model",
        )
    if objective.balance == "sampling":
        yield "objective.balance: sampling counts the rows of each class first", "repeat sets by data.train[].repeat"
    if objective.strategy == "late_stacking":
        yield (
            "objective.strategy: late_stacking keeps rows from training to fit its weights on",
            "choose another strategy",
        )
    if objective.cache_features:
        yield "objective.cache_features: true computes the features of all rows first", "take it out"
