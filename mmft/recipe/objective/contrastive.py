"""What contrastive learning reads."""

from __future__ import annotations

from typing import Literal

from mmft.recipe.section import Section, Share


class SimilarityFields(Section):
    """Fields of objectives that compare pictures with texts."""

    loss: Literal["infonce", "sigmoid"] = "infonce"
    """CLIP's loss, or SigLIP's."""
    train_logit_scale: bool = True
    """Train the scale and bias of the similarities too."""


class ContrastiveFields(Section):
    """Fields of a dual encoder's own runs."""

    cache_features: bool | None = None
    """true: compute what a tower that is not trained says of a picture or text once, and keep it in memory (1 GB a
    tower) and in the feature store for later runs; an error where every tower is trained."""
    probe_set: str | None = None
    """Evaluation set that must not be forgotten: its R@1 is taken before training and at every evaluation."""
    probe_max_drop: Share = 0.05
    """How far the probe set's R@1 may fall below its start."""
    probe_action: Literal["warn", "stop"] = "warn"
    """What happens when it falls further."""
