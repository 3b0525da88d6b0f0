"""The vocabulary head on supervised rows only (`objectives.sft.head_on_rows`); a plain run scores every position.

Saves: `(positions - supervised) * hidden * vocabulary` products in each direction, and the logits of those positions.
"""

from __future__ import annotations

from dataclasses import replace

from mmft.fast.plan import Candidate, Setting, Work
from mmft.objectives.sft import SftObjective


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether the run's loss is the cross-entropy of answers."""
    if setting.custom or setting.recipe.objective.name != "sft":
        return False, "the loss of this objective chooses its own rows"
    return True, "every supervised position has a row of its own in the head"


def saves(setting: Setting) -> str:
    """What the head costs elsewhere."""
    return "the head and its logits on all positions without loss"


def without(setting: Setting, work: Work) -> Work:
    """The head on every position."""
    if isinstance(work.objective, SftObjective):
        return replace(work, objective=work.objective.on_every_position())
    return work


CANDIDATE = Candidate("head_rows", holds, saves, without=without)
