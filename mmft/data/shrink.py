"""Pictures made smaller, all of a row by one factor, until the row fits; none is cut or left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

Size = tuple[int, int]
STEP, MOST_STEPS, SMALLEST = 0.9, 40, 16
"""Sides shrink by 0.9 in a step (0.015 of them at the end), but not below 16 pixels."""


def shrink(images: Sequence[Image.Image], fits: Callable[[Sequence[Size]], bool]) -> list[Image.Image] | None:
    """The pictures at the largest of the steps at which `fits` says that their sizes do; None where none is.

    The step is found by bisection (about six calls of `fits`): tokens hardly ever grow as a picture shrinks, and where
    they do, a smaller step than the largest may be taken.
    """

    def sizes(step: int) -> list[Size]:
        return [_scaled(image.size, STEP**step) for image in images]

    low, high = 0, MOST_STEPS
    if not images or not fits(sizes(high)):
        return None
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(sizes(middle)) else (middle, high)
    return [image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(images, sizes(high), strict=True)]


def _scaled(size: Size, factor: float) -> Size:
    width, height = (max(min(side, SMALLEST), round(side * factor)) for side in size)
    return width, height
