"""Rules of runs that sample answers."""

from __future__ import annotations

from mmft.recipe.objective.online import REWARDS, unknown_rewards
from mmft.recipe.rules import Rule
from mmft.recipe.schema import Recipe


def _online(recipe: Recipe) -> bool:
    return recipe.objective.name in ("grpo", "rloo", "ppo")


def _switchless(recipe: Recipe) -> bool:
    return recipe.adapter.method in ("full", "bitfit")


ONLINE_READS_NOT = ("data.supervise", "adapter.lora_dropout")
"""Fields that a run which samples its answers refuses."""

ONLINE_RULES: tuple[Rule, ...] = (
    Rule(
        "objective.rewards",
        ("objective.rewards", "objective.name"),
        lambda r: _online(r) and not r.objective.rewards,
        "objective.rewards: empty, so no answer is better than another",
        "name one",
    ),
    Rule(
        "objective.rewards",
        ("objective.rewards", "objective.name"),
        lambda r: _online(r) and bool(unknown_rewards(r.objective.rewards)),
        "objective.rewards: {objective.rewards} names something that is no reward",
        "correct the spelling; a function of your own is given as mmft train --reward FILE.py:NAME",
        REWARDS,
    ),
    Rule(
        "objective.num_generations",
        ("objective.num_generations", "objective.name"),
        lambda r: r.objective.name in ("grpo", "rloo") and r.objective.num_generations < 2,
        "objective.num_generations: 1, but {objective.name} compares answers to the same question",
        "set it to 4 to 16",
        "2 or more",
    ),
    Rule(
        "adapter.lora_dropout",
        ("adapter.lora_dropout", "objective.name"),
        lambda r: _online(r) and r.adapter.lora_dropout > 0,
        "adapter.lora_dropout: {adapter.lora_dropout}, but answers are sampled without dropout: the probabilities that"
        " are trained would be those of other models",
        "take it out",
    ),
    Rule(
        "data.supervise",
        ("data.supervise", "objective.name"),
        lambda r: _online(r) and r.data.supervise != "answers",
        "data.supervise: {objective.name} learns from the answers it samples, always in the place of a row's last one",
        "take it out",
    ),
    Rule(
        "adapter.method",
        ("adapter.method", "objective.name"),
        lambda r: _online(r) and r.adapter.method in ("prompt", "prefix"),
        "adapter.method: {adapter.method} is not sampled from with one forward for all answers",
        "choose lora or another method that changes layers",
    ),
    Rule(
        "objective.kl_coef",
        ("objective.kl_coef", "adapter.method", "objective.name"),
        lambda r: _online(r) and r.objective.kl_coef > 0 and _switchless(r),
        "objective.kl_coef: the reference is the model with its adapter off, and adapter.method: {adapter.method} has"
        " none to switch off",
        "set kl_coef: 0, or adapter.method: lora",
    ),
    Rule(
        "objective.name",
        ("adapter.method", "objective.name"),
        lambda r: r.objective.name == "ppo" and _switchless(r),
        "objective.name: ppo keeps its value head beside an adapter, and adapter.method is {adapter.method}",
        "set adapter.method: lora, or objective.name: grpo",
    ),
)
