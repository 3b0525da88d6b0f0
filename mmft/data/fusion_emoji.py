"""Emoji as picture, typed name and spoken name -> category, split by concept as in `pairs_emoji`.

Every emoji but flags (one concept) comes twice, as Twemoji and as OpenMoji, under one of its names typed and its full
name spoken. In the wild any of the three may be poor: with probability 1/2 each, and apart from each other, most of the
picture is covered, the typed name is down to a few letters, the speech is under noise of its own power times ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mmft.data import emoji
from mmft.data.pairs_emoji import emoji_rows, is_test
from mmft.data.speech import VOICES, speak, with_noise
from mmft.seeds import fold

LEFT_OUT = ("Flags", "Component")
POOR = 0.5
SIDE = 96
_CLEAN, _NOISY = 15.0, -10.0
"""Decibels of clean and of poor speech over its noise."""


def rows(part: str) -> Iterator[dict[str, Any]]:
    """Rows with `image`, `text`, `audio`, `label`, and in `quality` which of the three are poor."""
    for number, row in enumerate(emoji_rows()):
        if row["category"] in LEFT_OUT or is_test(row) != (part == "test"):
            continue
        for style in emoji.STYLES:
            rng = np.random.Generator(np.random.PCG64(fold(0, "fusion-emoji", number, style)))
            poor = rng.random(3) < POOR
            names = [row["name"], *row["short"]]
            spoken = speak(
                row["name"],
                voice=VOICES[rng.integers(len(VOICES))],
                speed=rng.uniform(0.85, 1.2),
                pitch=rng.uniform(0.85, 1.2),
            )
            told = [name for name, bad in zip(("picture", "text", "speech"), poor, strict=True) if bad]
            yield {
                "image": picture(emoji.art(style, row[style]), rng, covered=bool(poor[0])),
                "text": typed(names[rng.integers(len(names))], rng, poor=bool(poor[1])),
                "audio": with_noise(spoken, _NOISY if poor[2] else _CLEAN, rng),
                "label": row["category"],
                "quality": "poor " + ", ".join(told) if told else "all good",
            }


def picture(art: Image.Image, rng: np.random.Generator, *, covered: bool) -> Image.Image:
    """The art on white; covered by a grey field over all but a window of two fifths of its side."""
    ground = Image.new("RGBA", art.size, (255, 255, 255, 255))
    ground.alpha_composite(art)
    whole = ground.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if not covered:
        return whole
    window = SIDE * 2 // 5
    left, top = (int(value) for value in rng.integers(0, SIDE - window, 2))
    box = (left, top, left + window, top + window)
    hidden = Image.new("RGB", whole.size, (128, 128, 128))
    hidden.paste(whole.crop(box), box)
    return hidden


def typed(name: str, rng: np.random.Generator, *, poor: bool) -> str:
    """The name; of a poor one every letter but the first is lost with probability 1/2, and what is left mixed."""
    if not poor:
        return name
    kept = [letter for letter in name[1:].replace(" ", "") if rng.random() < 0.5]
    rng.shuffle(kept)
    return name[0] + "".join(kept)
