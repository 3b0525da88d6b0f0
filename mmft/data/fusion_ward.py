"""A diagnosis-like task: a picture of a spot on the skin, a note in free text and a table -> one of four findings.

A stand-in: nobody's data. Pictures, notes and numbers are made by the rules below, which are no medicine; what the set
has in common with clinical data is its shape: three sources that each tell a part, classes of unequal size (half are
harmless, one row in ten is malignant), numbers that are missing. A score here says nothing about patients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmft.seeds import fold

ROWS = {"train": 1200, "test": 600}
SIDE = 96
MISSING = 0.15
"""Chance of each cell of the table to be empty."""


@dataclass(frozen=True)
class Finding:
    """How often it is, and what it looks like: roughness of the outline and redness (0 to 1), mean age, temperature
    and marker, and what is said in training and in test."""

    name: str
    share: float
    rough: float
    red: float
    age: float
    temperature: float
    marker: float
    said: tuple[str, ...]
    said_later: tuple[str, ...]


FINDINGS = (
    Finding(
        "harmless", 0.5, 0.2, 0.3, 45, 36.7, 1.0,
        ("has been there for years without change", "found by chance, no complaints", "does not bother the patient"),
        ("unchanged since childhood", "noticed at a routine visit, otherwise well"),
    ),
    Finding(
        "infected", 0.2, 0.4, 0.7, 40, 38.2, 2.0,
        ("hot and very painful for two days", "began after a cut, pus came out", "swollen and tender, feels ill"),
        ("throbbing since the weekend, oozing", "sore after a bite, getting worse quickly"),
    ),
    Finding(
        "inflamed", 0.2, 0.5, 0.65, 42, 36.8, 1.6,
        ("itches, comes and goes", "appeared after a new soap", "dry and scaling, worse in winter"),
        ("itchy since wearing new gloves", "flaking skin, better with cream"),
    ),
    Finding(
        "malignant", 0.1, 0.75, 0.4, 62, 36.8, 3.0,
        ("has grown slowly over months", "changed its colour, bled once", "new dark edge, no pain"),
        ("larger than last year", "the border has become uneven, bleeds easily"),
    ),
)  # fmt: skip
_VAGUE = ("skin lesion, see picture", "referred for assessment", "please evaluate", "no history available")


def rows(part: str) -> Iterator[dict[str, Any]]:
    """Rows with `image`, `note`, the table's columns, `label`, and in `clinic` where it was seen."""
    shares = np.cumsum([one.share for one in FINDINGS])
    for number in range(ROWS[part]):
        rng = np.random.Generator(np.random.PCG64(fold(0, "fusion-ward", part, number)))
        finding = FINDINGS[int(np.searchsorted(shares, rng.random() * shares[-1]))]
        said = finding.said if part == "train" else finding.said_later
        table = {
            "age": round(float(np.clip(rng.normal(finding.age, 14), 1, 95))),
            "temperature": round(float(rng.normal(finding.temperature, 0.5)), 1),
            "marker": round(float(finding.marker * np.exp(rng.normal(0, 0.45))), 2),
            "place": str(rng.choice(["face", "trunk", "arm", "leg"])),
        }
        yield {
            "image": picture(finding, rng),
            "note": str(rng.choice(_VAGUE)) if rng.random() < 0.4 else str(rng.choice(said)),
            **{name: None if rng.random() < MISSING else value for name, value in table.items()},
            "label": finding.name,
            "clinic": str(rng.choice(["north", "south"])),
        }


def picture(finding: Finding, rng: np.random.Generator) -> Image.Image:
    """A spot on skin: a closed curve whose radius waves by its roughness, filled by its redness, slightly blurred."""
    rough = float(np.clip(rng.normal(finding.rough, 0.15), 0, 1))
    red = float(np.clip(rng.normal(finding.red, 0.15), 0, 1))
    skin = np.array([224, 178, 150]) - rng.integers(0, 90)
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    radius = np.full(120, SIDE * rng.uniform(0.2, 0.32))
    for wave in range(2, 9):
        radius *= 1 + 0.16 * rough * rng.normal() * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    centre = SIDE / 2 + rng.normal(0, 5, 2)
    points = np.stack((centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)), axis=1)
    colour = (1 - red) * np.array([110, 70, 50]) + red * np.array([205, 60, 55])
    out = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in skin.clip(0, 255)))
    ImageDraw.Draw(out).polygon([tuple(point) for point in points], fill=tuple(int(value) for value in colour))
    values = np.asarray(out.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)
    return Image.fromarray((values + rng.normal(0, 6, values.shape)).clip(0, 255).astype(np.uint8))
