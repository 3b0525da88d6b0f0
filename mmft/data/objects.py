"""Annotation files: a JSON object as a whole, and where the pictures lie that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft.paths import contained

_MAX_OBJECT_BYTES = 2 * 1024**3
_PICTURE_FOLDERS = (
    "train_images",
    "val_images",
    "test_images",
    "images", "Images", "train2017", "val2017", "test2017", "train2014", "val2014", "test2015",
    "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images",
)  # fmt: skip


def read_object(path: Path) -> dict[str, Any]:
    """The object of an annotation file. Raises DataError for one that is too large, no JSON, or no object."""
    size = path.stat().st_size
    if size > _MAX_OBJECT_BYTES:
        raise DataError(f"the file has {size} bytes", where=str(path), allowed=f"at most {_MAX_OBJECT_BYTES}")
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"broken JSON: {error}", where=f"{path}:{line}", do="write the file again") from error
    if not isinstance(found, dict):
        raise DataError(f"the file holds a {type(found).__name__}", where=str(path), allowed="an object {...}")
    return found


def listed(found: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """A list of an annotation file. Raises DataError where there is none."""
    value = found.get(key)
    if not isinstance(value, list):
        raise DataError(
            f"`{key}` is {'missing' if value is None else f'a {type(value).__name__}'}",
            where=str(path),
            allowed=f"an object with a list `{key}`; a file of rows is a list [...]",
            do="set data.train[].format, or name another file",
        )
    return value


def folder_of(root: Path, name: str) -> str:
    """`""` or the usual picture folder below `root`, with a slash, in which a file of this name lies."""
    options = [f"{folder}{name}" for folder in ("", *(f"{one}/" for one in _PICTURE_FOLDERS))]
    return first_there(root, options).removesuffix(name)


def first_there(root: Path, names: Sequence[str]) -> str:
    """The first of some names that is a file below `root`, else the first."""
    for name in names:
        try:
            contained(root, name)
        except DataError:
            continue
        return name
    return names[0]
