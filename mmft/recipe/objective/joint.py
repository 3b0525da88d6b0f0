"""What objectives with several heads read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mmft.recipe.section import Positive, Section

Weight = Annotated[float, Field(ge=0.0)]


class JointFields(Section):
    """Fields of objectives that train several heads together."""

    joint_weights: dict[Literal["contrastive", "matching", "caption"], Weight] = {}
    """Weights of the terms; one that is not named weighs 1 (in `dual` there is no `matching`), 0 switches it off."""
    decoder_layers: Positive = 2
    """Layers of the decoder that is put on a dual encoder; a model that writes already keeps its own."""


class DualFields(Section):
    """Fields of dual learning."""

    consistency: Literal["duality", "cycle"] = "duality"
    """`duality`: both directions describe one joint distribution (Xia et al. 2017); `cycle`: a generated caption must
    find its picture, and a found picture's caption be the text (He et al. 2016)."""
    consistency_weight: Weight = 0.1
    """Weight of the consistency term; 0 trains the two directions side by side."""


def weights_of(name: str, given: Mapping[Any, float]) -> dict[str, float]:
    """Term -> weight of a `joint` or `dual` objective, the unnamed ones filled in."""
    terms = ("contrastive", "caption") if name == "dual" else ("contrastive", "matching", "caption")
    return {term: float(given.get(term, 1.0)) for term in terms}
