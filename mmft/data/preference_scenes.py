"""Preferences over emoji scenes: `shipped:emoji-preferences/NAME` for each set of scenes NAME.

A row is one question about a scene with the true answer (`chosen`) and a plausible wrong one (`rejected`): another
thing of the same picture or group, another group, one picture more or less, a name where there is none. Pictures are
those of the scene set. Everything is a pure function of that set and the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmft.data import emoji
from mmft.data.scenes import EVAL_TYPES, scene_spec, shipped_rows
from mmft.files import scratch_folder
from mmft.seeds import generator

_RECIPE = 1
"""Raise when the rows change: it is part of the cache folder's name."""
_ASKED = {"How many": "how many", "Which group": "which group", "What is at": "where", "Is there": "is there"}


def shipped_preferences(name: str) -> Path:
    """Path of the `rows.jsonl` of a set in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); built when absent."""
    scene_spec(name)
    scenes = shipped_rows(name)
    digest = hashlib.sha256(json.dumps([scenes.parent.name, _RECIPE]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "data" / f"emoji-preferences-{name}-{digest}"
    return folder / "rows.jsonl" if (folder / "rows.jsonl").is_file() else build_preferences(scenes, folder)


def build_preferences(scenes: Path, folder: Path, *, limit: int | None = None, seed: int = 0) -> Path:
    """Make the preferences of a scene set (its `rows.jsonl`) in `folder`; at most `limit` rows.

    Built beside the folder and moved there at the end; the pictures are linked, or copied where that cannot be.
    """
    layouts = _lines(scenes.with_name("layouts.jsonl"))[:limit]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as made:
        (made / "images").mkdir()
        with (made / "rows.jsonl").open("w", encoding="utf-8") as out:
            for row, layout in zip(_lines(scenes)[:limit], layouts, strict=True):
                line = _preference(row, layout["cells"], generator(seed, "preference", row["id"]))
                source, target = scenes.parent / line["image"], made / line["image"]
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            made.replace(folder)
        except OSError:
            # Another process built the same set meanwhile; the content is the same by construction.
            if not (folder / "rows.jsonl").is_file():
                raise
    return folder / "rows.jsonl"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _preference(row: Mapping[str, Any], cells: Mapping[str, str], rng: random.Random) -> dict[str, Any]:
    asked: dict[str, list[tuple[str, str]]] = {}
    messages = row["messages"]
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        ask = question["content"][-1]["text"]
        kind = next((kind for start, kind in _ASKED.items() if ask.startswith(start)), None)
        if kind is not None:
            asked.setdefault(kind, []).append((ask, answer["content"][-1]["text"]))
    kind = rng.choice([kind for kind in EVAL_TYPES if kind in asked])
    ask, answer = rng.choice(asked[kind])
    return {
        "id": row["id"],
        "image": row["images"][0],
        "question": ask,
        "chosen": answer,
        "rejected": wrong_answer(kind, ask, answer, cells=cells, rng=rng),
        "tags": {**row["tags"], "type": kind},
    }


def wrong_answer(kind: str, ask: str, answer: str, *, cells: Mapping[str, str], rng: random.Random) -> str:
    """A wrong answer of the form that right ones have; `cells`: what lies where."""
    groups = {concept.name: concept.group for concept in emoji.concepts(0)}
    shown = list(cells.values())
    if kind == "how many":
        return str(rng.choice([n for n in (int(answer) - 1, int(answer) + 1) if 1 <= n <= 4]))
    if kind == "is there":
        thing = ask.removeprefix("Is there a ").removeprefix("Is there an ").rstrip("?")
        return f"{thing}: yes" if answer == "no" else "no"
    if kind == "which group":
        near = [groups[name] for name in shown if groups[name] != answer]
        return rng.choice(near or sorted(set(groups.values()) - {answer}))
    beside = [name for name in shown if name != answer]
    alike = sorted(name for name, group in groups.items() if group == groups[answer] and name not in shown)
    return rng.choice(beside) if beside and rng.random() < 0.5 else rng.choice(alike or sorted(set(groups) - {answer}))
