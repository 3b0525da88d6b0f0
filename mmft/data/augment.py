"""Random changes of training pictures, each a pure function of (seed, epoch, row, place in the row).

A picture keeps its size, so that a row keeps its number of image tokens and its length. The changes are torchvision's
(transforms v2); what they draw comes from a generator that is seeded for this one picture, so neither the number of
workers and processes nor a resume changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmft.recipe.augmentation import CHANGES
from mmft.seeds import fold


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The changes of a training set; `strengths` in the order in which they are applied."""

    strengths: tuple[tuple[str, float], ...]
    seed: int

    @classmethod
    def of(cls, strengths: Mapping[str, float], *, seed: int) -> Augmentation | None:
        """None when nothing is changed."""
        used = tuple((name, float(strengths[name])) for name in CHANGES if strengths.get(name))
        return cls(used, seed) if used else None

    def drawn(self, row: str, epoch: int, place: int) -> Drawn:
        """What happens to the `place`-th medium of a row in an epoch."""
        return Drawn(self.strengths, fold(self.seed, "augment", epoch, row, place))


@dataclass(frozen=True, slots=True)
class Drawn:
    """The changes of one picture in one epoch."""

    strengths: tuple[tuple[str, float], ...]
    seed: int

    def apply(self, image: Image.Image) -> Image.Image:
        """The changed picture, RGB and of the same size; torch's own generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, strength in self.strengths:
                image = _transform(name, strength, image)(image)
        return image


def _transform(name: str, strength: float, image: Image.Image) -> Any:
    from torchvision.transforms import v2  # not at the top: it takes half a second, and few runs need it

    height, width = image.height, image.width
    if name == "crop":
        shape = width / height
        ratio = (shape * math.sqrt(3 / 4), shape * math.sqrt(4 / 3))
        return v2.RandomResizedCrop((height, width), scale=(1 - strength, 1.0), ratio=ratio)
    if name == "blur":
        return v2.GaussianBlur(2 * math.ceil(2 * strength) + 1, sigma=(1e-3, strength))
    made: dict[str, Any] = {
        "horizontal_flip": lambda: v2.RandomHorizontalFlip(strength),
        "vertical_flip": lambda: v2.RandomVerticalFlip(strength),
        "rotate": lambda: v2.RandomRotation(strength, fill=255),
        "color": lambda: v2.ColorJitter(strength, strength, strength),
        "grayscale": lambda: v2.RandomGrayscale(strength),
    }
    return made[name]()
