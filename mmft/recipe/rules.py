"""What a cross-field rule is, and what several of them ask of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmft.recipe.schema import Recipe

PARTS = ("vision", "audio", "projector", "cross_attention", "language", "head")
SUBPARTS = ("attention", "mlp", "norm", "embedding", "other")


@dataclass(frozen=True, slots=True)
class Rule:
    """`broken(recipe)` true means: report `what` at `field`, unless one of `reads` is wrong by itself.

    `what` may name sections: `{train.eval_steps}`.
    """

    field: str
    reads: tuple[str, ...]
    broken: Callable[[Recipe], bool]
    what: str
    do: str
    allowed: str | None = None


def quantized(recipe: Recipe) -> bool:
    """Whether any part of the base is quantized."""
    return recipe.quantization.load_in_4bit or recipe.quantization.load_in_8bit


def target_parts(recipe: Recipe) -> list[str]:
    """The parts that `adapter.targets` names, in the order of the targets."""
    names = ("language" if target == "all-linear" else target.split(".")[0] for target in recipe.adapter.targets)
    return list(dict.fromkeys(names))
