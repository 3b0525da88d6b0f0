"""What contrastive learning reads."""

from __future__ import annotations

from typing import Literal

from mmft.recipe.section import Section


class ContrastiveFields(Section):
    """Fields of objectives that compare pictures with texts."""

    loss: Literal["infonce", "sigmoid"] = "infonce"
    """CLIP's loss, or SigLIP's."""
    train_logit_scale: bool = True
    """Train the scale and bias of the similarities too."""
