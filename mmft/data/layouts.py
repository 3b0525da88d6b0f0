"""How a data set lies on disk: a source becomes rows with common names (`image`, `audio`, `video`, `text`, `captions`).

`rows`: a file of rows, or a folder with a `metadata` file; `folder`: files that share a stem, in class folders or not;
`webdataset`: tar shards; `flickr8k`: a text file of captions; `coco`: an object of images and annotations; the question
sets of `annotations.py`. `dialects.py`, `pairs.py` and
`table_rows.py` read the rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.data.annotations import annotated, looks_annotated
from mmft.data.media import kind_of_name, read_bytes
from mmft.data.objects import folder_of, listed, read_object
from mmft.data.readers import Read, Row, parse_json, read_rows
from mmft.data.sample import MediaRef
from mmft.data.shards import is_shards, read_shards
from mmft.errors import DataError, MmftError
from mmft.paths import contained

ANNOTATED = ("vqav2", "gqa", "textvqa", "docvqa", "scienceqa", "chartqa")
LAYOUTS = ("rows", "folder", "webdataset", "flickr8k", "coco", *ANNOTATED)
MAX_TEXT_BYTES = 1_000_000
_TOKEN = re.compile(r"^(?P<image>[^\t#]+\.\w+)#\d+\t(?P<caption>.*)$")
_HEADING = "image,caption"
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Source:
    """A data set that was looked at: its layout, its rows, and the folder that its media lie in."""

    layout: str
    rows: Read
    root: Path


def open_source(path: Path, *, layout: str = "auto", media_root: Path | None = None) -> Source:
    """The rows of a file or folder, as `layout` says or as its beginning shows.

    Raises DataError for a source that is missing, broken as a whole, or not of the layout that was asked for.
    """
    found = layout if layout in LAYOUTS else _guess(path)
    root = media_root if media_root is not None else path if path.is_dir() else path.parent
    if found == "rows":
        table = _metadata(path) if path.is_dir() else None
        return Source(found, read_rows(table or path), root)
    if found == "webdataset":
        return Source(found, read_shards(path), root)
    if found == "folder":
        if not path.is_dir():
            raise DataError("this is no folder", where=str(path), do="name the folder that holds the files")
        return Source(found, _folder(path, root), root)
    if not path.is_file():
        raise DataError(f"there is no data file '{path}'", where="data.train/eval[].path", do="mend the path")
    if media_root is None and path.parent.name == "annotations":
        root = path.parent.parent
    if found in ANNOTATED:
        return Source(found, annotated(path, found, root), root)
    rows = _flickr(path, root) if found == "flickr8k" else _coco(path, root)
    return Source(found, rows, root)


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in _METADATA if (folder / name).is_file()), None)


def _guess(path: Path) -> str:
    if is_shards(path):
        return "webdataset"
    if path.is_dir():
        datasets = any((path / name).exists() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))
        return "rows" if datasets or _metadata(path) else "folder"
    if path.suffix.lower() not in (".txt", ".token", ".tsv", ".json") or not path.is_file():
        return "rows"
    with path.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() == ".json" and (known := looks_annotated(head)) is not None:
        return known
    if path.suffix.lower() == ".json":
        return "coco" if head[:1] == b"{" and (b'"images"' in head or b'"annotations"' in head) else "rows"
    line = head.split(b"\n")[0].decode("utf-8", errors="replace").strip()
    return "flickr8k" if _TOKEN.match(line) or line.replace(" ", "").lower() == _HEADING else "rows"


# ---------------------------------------------------------------- files that share a stem


def _folder(folder: Path, root: Path) -> Read:
    """One row per stem, sorted: `id`, `image`, `audio`, `video`, `text` (of .txt) and the keys of a .json. When every
    file lies in a subfolder and no .json gives one, the first subfolder's name is the `label`. Paths are relative to
    `root`. Hidden files and linked folders are passed over."""
    stems: dict[str, list[str]] = {}
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and (kind_of_name(name) or name.lower().endswith((".txt", ".json"))):
                path = os.path.relpath(os.path.join(here, name), folder).replace(os.sep, "/")
                stems.setdefault(path.rsplit(".", 1)[0], []).append(path)
    if not stems:
        raise DataError(
            "the folder holds no pictures, sounds, videos or texts",
            where=str(folder),
            allowed="files such as a.png + a.txt + a.wav that share a stem, or a folder of the datasets library",
            do="check the path",
        )
    labelled = all("/" in stem for stem in stems)
    for stem in sorted(stems):
        where = f"{folder / stem}.*"
        try:
            row = _joined(sorted(stems[stem]), folder, root, where)
        except MmftError as error:
            yield where, DataError(error.problems)
            continue
        if labelled:
            row.setdefault("label", stem.split("/")[0])
        yield where, {"id": stem, **row}


def _joined(paths: list[str], folder: Path, root: Path, where: str) -> Row:
    row: Row = {}
    for path in paths:
        kind = kind_of_name(path)
        if kind is not None:
            if kind in row:
                raise DataError(f"two files give the {kind} of one row: {row[kind]}, {path}", where=where)
            row[kind] = os.path.relpath(folder / path, root)
            continue
        ref = MediaRef(path=path, root=folder)
        if contained(folder, path).stat().st_size > MAX_TEXT_BYTES:
            raise DataError(f"'{path}' is longer than {MAX_TEXT_BYTES} bytes", where=where, do="shorten the text")
        try:
            text = read_bytes(ref).decode("utf-8-sig")
            found = parse_json(text) if path.lower().endswith(".json") else {"text": text.strip()}
        except (ValueError, RecursionError) as error:
            raise DataError(f"'{path}' cannot be read: {error}", where=where, allowed="UTF-8 text, JSON") from error
        if not isinstance(found, dict):
            raise DataError(f"'{path}' holds a {type(found).__name__}", where=where, allowed="a JSON object")
        row |= {key: value for key, value in found.items() if key not in row}
    return row


# ---------------------------------------------------------------- caption files


def _flickr(path: Path, root: Path) -> Read:
    """Rows `image`, `captions` of Flickr8k.token.txt (`name.jpg#0<TAB>caption`) or captions.txt (`image,caption`);
    lines of one picture that follow each other are one row."""
    found = _grouped(_flickr_lines(path))
    return _placed(found, root)


def _flickr_lines(path: Path) -> Iterator[tuple[str, tuple[str, str] | DataError]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(iter(lambda: stream.readline(MAX_TEXT_BYTES), b""), start=1):
            where = f"{path}:{number}"
            line = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape").rstrip("\r\n")
            if not line.strip() or (number == 1 and line.replace(" ", "").lower() == _HEADING):
                continue
            token = _TOKEN.match(line)
            name, between, caption = (token[1], ",", token[2]) if token else line.partition(",")
            if caption.startswith('"') and caption.endswith('"') and len(caption) > 1 and not token:
                caption = caption[1:-1].replace('""', '"')
            if not between or kind_of_name(name.strip()) != "image":
                yield (
                    where,
                    DataError(
                        "the line is no caption", where=where, allowed="name.jpg#0<TAB>caption, or name.jpg,caption"
                    ),
                )
            elif not caption.isprintable() and any(0xDC80 <= ord(one) <= 0xDCFF for one in caption):
                yield where, DataError("the line is not UTF-8", where=where, do="save the file as UTF-8")
            else:
                yield where, (name.strip(), caption.strip())


def _grouped(lines: Iterable[tuple[str, tuple[str, str] | DataError]]) -> Read:
    held: Row | None = None
    place = ""
    for where, line in lines:
        if isinstance(line, DataError):
            yield where, line
            continue
        name, caption = line
        if held is not None and held["image"] != name:
            yield place, held
            held = None
        if held is None:
            held, place = {"image": name, "captions": []}, where
        held["captions"].append(caption)
    if held is not None:
        yield place, held


def _coco(path: Path, root: Path) -> Read:
    """One row per picture: `image`, `id` and its `captions`, at the number of its first annotation; a picture without
    one is left out, an annotation without a picture or caption is a bad row."""
    found = read_object(path)
    names = {
        entry["id"]: entry["file_name"]
        for entry in listed(found, "images", path)
        if isinstance(entry, dict)
        and isinstance(entry.get("file_name"), str)
        and isinstance(entry.get("id"), int | str)
    }
    rows: dict[Any, tuple[str, Row]] = {}
    bad: list[tuple[str, DataError]] = []
    for number, entry in enumerate(listed(found, "annotations", path), start=1):
        where = f"{path}: annotation {number}"
        key = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(key, int | str) or key not in names:
            bad.append((where, DataError(f"the annotation belongs to no picture (image_id {key!r})", where=where)))
        elif not isinstance(entry.get("caption"), str):
            bad.append((where, DataError("the annotation has no caption", where=where, allowed="COCO captions")))
        else:
            row = rows.setdefault(key, (where, {"id": str(key), "image": names[key], "captions": []}))[1]
            row["captions"].append(entry["caption"])
    yield from _placed((*rows.values(), *bad), root)


def _placed(rows: Iterable[tuple[str, Row | DataError]], root: Path) -> Read:
    """Rows whose picture names are completed by the subfolder of `root` that holds the first of them."""
    prefix: str | None = None
    for where, row in rows:
        if isinstance(row, dict):
            if prefix is None:
                prefix = folder_of(root, str(row["image"]))
            row = {**row, "image": f"{prefix}{row['image']}"}
        yield where, row
