"""Pictures that look the same: a difference hash to find candidates, small colour thumbnails to confirm them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

MOST_BITS = 3
"""Bits of 64 that the hashes of one picture, scaled or compressed again, may differ by."""
MOST_COLOUR, MOST_GREY = 10.0, 12.0
"""Mean difference of the thumbnails' colours, and largest of their brightness (0 to 255), up to which they show the
same. JPEG and scaling changed the brightness of a cell by at most 7 and colours by 8 in 300 made pictures; another
small thing on the same ground changes some cell's brightness by tens."""
_SIDE = 8
_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class Likeness:
    """What is kept of a picture: 64 bits (is a cell of 8 x 8 brighter than its right neighbour), 192 colours."""

    bits: int
    colours: bytes

    @property
    def telling(self) -> bool:
        """Whether there is enough in the picture to tell it by its looks: a plain area is like any other."""
        return float(np.frombuffer(self.colours, np.uint8).reshape(-1, 3).std(axis=0).max()) >= 4.0


def likeness(image: Image.Image) -> Likeness:
    """The hash (after the difference hash of Krawetz 2013) and thumbnail of an RGB picture."""
    grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return Likeness(int("".join("1" if bit else "0" for bit in bits), 2), small.tobytes())


class Likes:
    """An index of pictures. Two hashes with at most 3 different bits agree in one of four stretches of 16, so that only
    those that share one are compared."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], list[tuple[Likeness, str]]] = defaultdict(list)

    def add(self, one: Likeness, name: str) -> None:
        """Hold a picture under a name."""
        for place in range(4):
            self._held[place, one.bits >> 16 * place & 0xFFFF].append((one, name))

    def find(self, one: Likeness) -> str | None:
        """The name of a held picture that looks the same."""
        colours = np.frombuffer(one.colours, np.uint8).astype(np.int16)
        for place in range(4):
            for other, name in self._held.get((place, one.bits >> 16 * place & 0xFFFF), ()):
                if (one.bits ^ other.bits).bit_count() <= MOST_BITS:
                    theirs = np.frombuffer(other.colours, np.uint8)
                    apart = colours - theirs
                    grey = np.abs(apart.reshape(-1, 3) @ _GREY).max()
                    if grey <= MOST_GREY and np.abs(apart).mean() <= MOST_COLOUR:
                        return name
        return None
