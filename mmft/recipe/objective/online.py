"""What reinforcement learning on sampled answers reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from mmft.recipe.section import Positive, Rate, Section, Share

REWARD_METRICS = ("exact_match", "token_f1", "vqa_accuracy")
"""Metrics that are rewards too: a number for each answer by itself."""
_PLAIN = (*REWARD_METRICS, "iou", "length", "unfinished")
REWARDS = f"{', '.join(_PLAIN)}, format:REGEX, reward_model:FOLDER"
"""What a recipe can name, for an error."""
_LONGEST = 300


def unknown_rewards(names: Iterable[str]) -> list[str]:
    """Those that are no reward."""

    def known(name: str) -> bool:
        kind, colon, given = name.partition(":")
        return (kind in _PLAIN and not colon) or (kind in ("format", "reward_model") and 0 < len(given) <= _LONGEST)

    return [name for name in names if not known(name)]


class RolloutFields(Section):
    """Fields of objectives that sample answers. The longest answer is `evaluate.max_new_tokens`."""

    rewards: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {"exact_match": 1.0}
    """Reward -> weight in the sum: a metric (`exact_match`, `token_f1`, `vqa_accuracy`), `iou` of boxes, `length`
    (minus the share of the longest answer), `unfinished` (-1 without an end token), `format:REGEX`,
    `reward_model:FOLDER`."""
    num_generations: Positive = 8
    """Answers sampled to each question."""
    temperature: Rate = 1.0
    """Of the sampling, and of the distribution that is trained."""
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL divergence from the model without its adapter: in the loss (grpo) or the reward (rloo, ppo)."""
    clip: tuple[Rate, Rate] = (0.2, 0.2)
    """How far below and above 1 the ratio of probabilities counts; DAPO's clip-higher is a larger second number."""
    num_iterations: Positive = 1
    """Updates on the same sampled answers; with 1 the ratio is 1 and `clip` has nothing to do."""


class GroupFields(Section):
    """Fields of GRPO."""

    variant: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """How tokens are weighted: by answer, all alike (`dapo`), or all alike by a constant and without dividing the
    advantages by their standard deviation (`dr_grpo`)."""


class ValueFields(Section):
    """Fields of PPO's value function."""

    gae_lambda: Share = 0.95
    """Between one-step advantages (0) and whole-answer ones (1)."""
    value_coef: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the value loss."""
