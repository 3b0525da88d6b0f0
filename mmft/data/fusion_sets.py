"""The shipped sets for fusion: `shipped:fusion/SET-PART`, parts `train` and `test`.

`emoji`: picture, typed name and spoken name -> category. `sentiment`: sentence, face and voice -> polarity. `events`:
frames, sound and log line -> event. `ward`: picture, note and table -> finding (a stand-in for clinical data, made up
throughout). Each is described in its own file. What the train and the test rows are made of (concepts, words, things)
is disjoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmft.data import emoji, fusion_emoji, fusion_events, fusion_sentiment, fusion_ward
from mmft.data.speech import PACKAGE, write_wav
from mmft.errors import DataError, choices
from mmft.files import scratch_folder

Row = dict[str, Any]
MAKERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "emoji": fusion_emoji.rows,
    "sentiment": fusion_sentiment.rows,
    "events": fusion_events.rows,
    "ward": fusion_ward.rows,
}
"""Set -> part -> rows, in which pictures are PIL's, sounds arrays, and frames lists of pictures."""
FUSION_SETS = tuple(f"{name}-{part}" for name in MAKERS for part in ("train", "test"))
_RECIPE = 1
"""Raise when the rows change: it is part of the cache folders' names."""


def shipped_fusion(name: str) -> Path:
    """Path of the `rows.jsonl` of a set in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); built when absent."""
    if name not in FUSION_SETS:
        raise DataError(
            f"there is no shipped fusion set {name!r}", allowed=choices(FUSION_SETS, word=name), do="choose one of them"
        )
    versions = [f"{package}={emoji.package_version(package)}" for package in (*emoji.PACKAGES, PACKAGE)]
    digest = hashlib.sha256(json.dumps([name, versions, _RECIPE]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "data" / f"fusion-{name}-{digest}"
    return folder / "rows.jsonl" if (folder / "rows.jsonl").is_file() else build_fusion(name, folder)


def build_fusion(name: str, folder: Path, *, limit: int | None = None) -> Path:
    """Make a set in `folder`; at most `limit` rows. Built beside it and moved there at the end."""
    kind, part = name.rsplit("-", 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as made:
        for inside in ("images", "sounds"):
            (made / inside).mkdir()
        with (made / "rows.jsonl").open("w", encoding="utf-8") as out:
            for number, row in enumerate(MAKERS[kind](part)):
                if number == limit:
                    break
                held = {column: _put(made, f"{number:05d}", column, value) for column, value in row.items()}
                out.write(json.dumps({"id": f"{part}-{number}", **held}, ensure_ascii=False) + "\n")
        try:
            made.replace(folder)
        except OSError:
            # Another process built the same set meanwhile.
            if not (folder / "rows.jsonl").is_file():
                raise
    return folder / "rows.jsonl"


def _put(folder: Path, stem: str, column: str, value: Any) -> Any:
    """What stands in the row for a cell: the path of a picture or sound that is written here, else the cell."""
    if isinstance(value, Image.Image):
        value.save(folder / "images" / f"{stem}.png")
        return f"images/{stem}.png"
    if isinstance(value, np.ndarray):
        write_wav(folder / "sounds" / f"{stem}.wav", value)
        return f"sounds/{stem}.wav"
    if isinstance(value, list):
        return [_put(folder, f"{stem}-{at}", column, one) for at, one in enumerate(value)]
    return value
