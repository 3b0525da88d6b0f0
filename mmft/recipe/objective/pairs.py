"""What is read of pairs of a picture and its texts."""

from __future__ import annotations

from mmft.recipe.section import Count, Section


class PairFields(Section):
    """Fields of objectives that learn from pairs."""

    captions_per_image: Count = 0
    """Texts of a picture in a step, drawn by the seed; 0: all of them."""
