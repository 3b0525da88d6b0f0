"""What supervised fine-tuning reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmft.recipe.section import Section


class SmoothingFields(Section):
    """Fields of objectives whose targets are tokens."""

    label_smoothing_factor: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the target spread evenly over the vocabulary."""
