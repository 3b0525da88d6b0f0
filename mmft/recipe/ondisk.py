"""What a recipe names must exist: data, media folders, local models. Nothing is opened."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmft.errors import nearest
from mmft.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Finding:
    """One break of a rule that holds for entries of a list or mapping."""

    field: str
    what: str
    do: str
    allowed: str | None = None


DATA_FILES = "a .jsonl, .json, .parquet or .csv file, a folder of the datasets library, or shipped:emoji-scenes/NAME"


def _exists(path: str, *, folder: bool = False) -> bool:
    try:
        return bool(path) and (Path(path).is_dir() if folder else Path(path).exists())
    except (OSError, ValueError):
        return False


def _matches(pattern: str) -> bool:
    try:
        return next(glob.iglob(pattern, recursive=True), None) is not None
    except (OSError, ValueError):
        return False


def _near_file(path: str) -> str:
    try:
        names = [entry.name for entry in Path(path).parent.iterdir()]
    except (OSError, ValueError):
        names = []
    near = nearest(Path(path).name, names)
    return f"check the path (nearest: '{near}')" if near else "check the path; it is relative to the recipe, or to here"


def is_below_file(path: Path) -> bool:
    """Whether `path` cannot be a folder, because it or a folder above it is a file."""
    return any(_exists(str(p)) and not p.is_dir() for p in (path, *path.parents))


def missing_sources(recipe: Recipe) -> Iterator[Finding]:
    """Data files and media folders that are not there, and URLs."""
    sets = (("train", recipe.data.train), ("eval", recipe.data.eval))
    for field, source in ((f"data.{key}.{i}", entry) for key, entries in sets for i, entry in enumerate(entries)):
        if source.path.startswith("shipped:"):
            continue
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source.path):
            do = "download it first; nothing is fetched from the network"
            yield Finding(
                f"{field}.path", f"{field}.path: {source.path[:120]!r} is a URL", do, "a local file or folder"
            )
        elif not _exists(source.path) and not (source.streaming and _matches(source.path)):
            what = f"{field}.path: {source.path[:200]!r} does not exist"
            yield Finding(f"{field}.path", what, _near_file(source.path), DATA_FILES)
        if source.media_root is not None and not _exists(source.media_root, folder=True):
            what = f"{field}.media_root: {source.media_root[:200]!r} is not a folder"
            yield Finding(f"{field}.media_root", what, "name the folder that image paths are relative to", "a folder")


def missing_model(recipe: Recipe) -> Iterator[Finding]:
    """A model that is neither a folder, nor shipped, nor formed like a hub id."""
    name = recipe.model.name_or_path
    looks_local = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if name.startswith("shipped:") or _exists(name, folder=True):
        return
    field, allowed = "model.name_or_path", "a hub id (ORG/NAME), a folder, or shipped:NAME"
    if not name or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name) or "\n" in name or len(name) > 500:
        yield Finding(field, f"{field}: {name[:120]!r} is not a model", "correct it", allowed)
    elif _exists(name):
        yield Finding(field, f"{field}: {name[:200]!r} is a file", "name the folder that holds config.json", allowed)
    elif looks_local:
        yield Finding(field, f"{field}: {name[:200]!r} does not exist", _near_file(name.rstrip("/")), allowed)
