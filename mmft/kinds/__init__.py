"""Kinds of runs: all that a run does differently for its objective, one file for each kind."""

from __future__ import annotations

from mmft.kinds.base import Kind
from mmft.kinds.captioning import Captioning
from mmft.kinds.chat import Chat
from mmft.kinds.fusion import Fusion
from mmft.kinds.joint import Dual, Joint
from mmft.kinds.masked import Masked
from mmft.kinds.online import Online
from mmft.kinds.pairs import Pairs
from mmft.kinds.preference import Preference
from mmft.kinds.reward import Reward
from mmft.recipe.schema import Recipe

KINDS: tuple[Kind, ...] = (
    Chat(),
    Pairs(),
    Captioning(),
    Fusion(),
    Joint(),
    Dual(),
    Masked(),
    Online(),
    Preference(),
    Reward(),
)


def kind_of(recipe: Recipe) -> Kind:
    """The kind of run that serves `objective.name`."""
    return next(kind for kind in KINDS if recipe.objective.name in kind.objectives)
