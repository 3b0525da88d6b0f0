"""Captions of made scenes: `shipped:emoji-captions/NAME`, an ordinary folder of pairs (`rows.jsonl`, `images/*.jpg`).

A scene is that of `mmft.data.scenes`, one to four emoji on a 2x2 grid, but a thing may stand there twice. Its captions
say all that is in it, in three orders: "a cat at the top left and two apples at the bottom", the other way round, and
with the places first. So what a caption gets wrong is known: the name, the number or the place. No layout of a test set
is in a training set; `concepts` tells whether a test row shows things that are drawn in the training rows of its style.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mmft.data import emoji
from mmft.data.emoji import Concept
from mmft.data.scenes import CELLS, concept_pool, draw_scene, layout_bucket
from mmft.errors import DataError, choices
from mmft.files import scratch_folder
from mmft.seeds import generator

_QUALITY = 92
_TWICE = 0.3
"""Share of the scenes of two or more things in which one thing stands twice."""
_RECIPE = 1
"""Raise when the rows change: it is part of the cache folder's name."""

_PLACES = {
    frozenset({"top left", "top right"}): "at the top",
    frozenset({"bottom left", "bottom right"}): "at the bottom",
    frozenset({"top left", "bottom left"}): "on the left",
    frozenset({"top right", "bottom right"}): "on the right",
}
Thing = tuple[str, str]
"""What it is with its number ("two apples"), and where ("at the bottom")."""


@dataclass(frozen=True, slots=True)
class CaptionSpec:
    """One set: style, rows, the pools its concepts are drawn from in turn, and the layout buckets it owns."""

    name: str
    style: str
    rows: int
    pools: tuple[str, ...]
    buckets: tuple[int, int]
    seed: int = 0


CAPTION_SETS: dict[str, CaptionSpec] = {
    spec.name: spec
    for spec in (
        CaptionSpec("twemoji-train", "twemoji", 40_000, ("all",), (0, 70)),
        CaptionSpec("twemoji-test", "twemoji", 300, ("all",), (70, 78)),
        CaptionSpec("openmoji-train", "openmoji", 6_000, ("trained",), (78, 92)),
        CaptionSpec("openmoji-test", "openmoji", 480, ("trained", "new"), (92, 100)),
    )
}


def shipped_captions(name: str) -> Path:
    """Path of the `rows.jsonl` of a set in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); built when absent."""
    if name not in CAPTION_SETS:
        raise DataError(
            f"there is no shipped caption set {name!r}",
            allowed=choices(CAPTION_SETS, word=name),
            do="choose one of them",
        )
    spec = CAPTION_SETS[name]
    versions = [f"{package}={emoji.package_version(package)}" for package in emoji.PACKAGES]
    known = json.dumps([dataclasses.asdict(spec), versions, _RECIPE], sort_keys=True)
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "data" / f"emoji-captions-{name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    return folder / "rows.jsonl" if (folder / "rows.jsonl").is_file() else build_captions(name, folder)


def build_captions(name: str, folder: Path, *, limit: int | None = None) -> Path:
    """Make a set (its first `limit` rows) in `folder`. Built beside it and moved there at the end."""
    spec = CAPTION_SETS[name]
    emoji.halves(spec.seed)  # raises here, and not in a worker, where a package is missing
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as made:
        (made / "images").mkdir()
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            rows = pool.map(lambda index: _make_row(spec, made, index), range(min(spec.rows, limit or spec.rows)))
            with (made / "rows.jsonl").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            made.replace(folder)
        except OSError:
            # Another process built the same set meanwhile; the content is the same by construction.
            if not (folder / "rows.jsonl").is_file():
                raise
    return folder / "rows.jsonl"


def _make_row(spec: CaptionSpec, made: Path, index: int) -> dict:
    """Row `index` of a set; the picture is written as a side effect."""
    rng = generator(spec.seed, "captions", spec.name, index)
    pool = spec.pools[index % len(spec.pools)]
    layout = _draw_layout(spec, rng, concept_pool(pool, spec.seed))
    name = f"images/{index:06d}.jpg"
    draw_scene(spec.style, layout, rng).save(made / name, quality=_QUALITY)
    texts = captions({cell: concept.name for cell, concept in layout.items()})
    tags = {"style": spec.style, "concepts": pool, "pictures": str(len(layout))}
    return {"id": f"{spec.name}-{index:06d}", "image": name, "captions": texts, "tags": tags}


def _draw_layout(spec: CaptionSpec, rng: random.Random, pool: tuple[Concept, ...]) -> dict[str, Concept]:
    """One to four concepts in as many cells, one of them twice now and then, drawn until this set owns the layout."""
    low, high = spec.buckets
    while True:
        count = rng.choice((1, 2, 2, 3, 3, 4))
        cells = sorted(rng.sample(CELLS, count), key=CELLS.index)
        things = rng.sample(pool, count)
        if count > 1 and rng.random() < _TWICE:
            one, other = rng.sample(range(count), 2)
            things[other] = things[one]
        layout = dict(zip(cells, things, strict=True))
        if low <= layout_bucket({cell: concept.name for cell, concept in layout.items()}) < high:
            return layout


def captions(cells: dict[str, str]) -> list[str]:
    """The captions of a scene (cell -> name), in three orders; fewer where two of them are the same."""
    places: dict[str, list[str]] = {}
    for cell in CELLS:
        if cell in cells:
            places.setdefault(cells[cell], []).append(cell)
    things = [_thing(name, where) for name, where in places.items()]
    plain = [f"{what} {where}" for what, where in things]
    led = [f"{where} {what}" for what, where in things]
    return list(dict.fromkeys([_joined(plain), _joined(plain[::-1]), _joined(led)]))


def _thing(name: str, cells: list[str]) -> Thing:
    if len(cells) == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}", f"at the {cells[0]}"
    where = _PLACES.get(frozenset(cells), "at the " + " and the ".join(cells))
    return f"two {plural(name)}", where


def plural(name: str) -> str:
    """The plural of a short English name by the three rules of spelling; one that ends in s stays as it is."""
    if name.endswith("s"):
        return name
    if name.endswith(("x", "z", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
