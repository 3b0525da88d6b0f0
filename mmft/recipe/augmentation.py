"""The changes of pictures that `data.augmentation` may name, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Iterator

from mmft.errors import choices
from mmft.recipe.ondisk import Finding
from mmft.recipe.schema import Recipe

CHANGES: dict[str, tuple[str, float]] = {
    "horizontal_flip": ("probability of mirroring left and right", 1.0),
    "vertical_flip": ("probability of turning upside down", 1.0),
    "crop": ("up to this share of the area is cut away, the rest resized to the old size", 0.95),
    "rotate": ("up to this many degrees either way, corners white", 180.0),
    "color": ("brightness, contrast and saturation by up to this share", 1.0),
    "grayscale": ("probability of losing all colour", 1.0),
    "blur": ("Gaussian blur with a sigma of up to this many pixels", 50.0),
}
"""Name -> what its number means, and the largest number; applied in this order."""


def augmentations(recipe: Recipe) -> Iterator[Finding]:
    """Unknown names and numbers out of range."""
    for name, strength in recipe.data.augmentation.items():
        field = f"data.augmentation.{name}"
        if name not in CHANGES:
            yield Finding(
                field, f"{field}: no such change", do="take one of these names", allowed=choices(CHANGES, word=name)
            )
            continue
        meaning, largest = CHANGES[name]
        if not 0.0 <= strength <= largest:
            allowed = f"0 to {largest:g}: {meaning}"
            yield Finding(
                field, f"{field}: {strength:g} is out of range", do="take a number in the range", allowed=allowed
            )
