"""Files become rows: an iterator of (`file:line`, row), where a broken line is a `DataError` in the row's place."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmft.errors import DataError, choices

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
Row = dict[str, Any]
Read = Iterator[tuple[str, Row | DataError]]
MAX_LINE_BYTES = 64 * 1024 * 1024


def read_rows(path: Path) -> Read:
    """Rows of a .jsonl/.json/.parquet/.csv file or of a folder written by `datasets.Dataset.save_to_disk`.

    A line that is no JSON object comes as a DataError with its `file:line`; a file that is missing, of another kind
    or broken as a whole raises DataError.
    """
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"there is no data file '{path}'",
            where="data.train/eval[].path",
            allowed=choices(sorted(siblings)[:20], word=path.name)
            if siblings
            else f"a file ending in {', '.join(SUFFIXES)}, a folder of the datasets library, or shipped:NAME",
            do="give a path relative to the recipe file, or an absolute one",
        )
    if path.is_dir():
        return _folder(path)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"'{path.name}' is no data file that is read here",
            where=str(path),
            allowed=f"{', '.join(SUFFIXES)} or a folder of the datasets library",
            do="convert the file to one of these, or rename it if it is one",
        )
    if not path.is_file():
        raise DataError("the data file is not a regular file", where=str(path), do="name a file or a folder")
    return reader(path)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!a} is given twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for a key that an object has twice and for half a surrogate
    pair, and RecursionError."""
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark (BOM) stands before it")
    value = _DECODER.decode(text)
    _whole(value, text)
    return value


def _whole(value: Any, text: str) -> None:
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"a text holds half a surrogate pair ({error.object[error.start]!a})") from error


def parse_line(line: bytes, where: str) -> Row | DataError:
    """The row of one line of a .jsonl file, or what is wrong with it."""
    try:
        text = line.decode("utf-8").strip()
        row = parse_json(text)
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: byte {error.start} is {line[error.start]:#04x}", where=where)
    except (ValueError, RecursionError) as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return DataError(f"broken JSON{column}: {getattr(error, 'msg', error)}", where=where)
    return row if isinstance(row, dict) else _no_object(row, where)


def _no_object(row: Any, where: str) -> DataError:
    return DataError(f"the row is a {type(row).__name__}", where=where, allowed="a JSON object {...}")


def _jsonl(path: Path) -> Read:
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"the line is longer than {MAX_LINE_BYTES} bytes",
                    where=where,
                    do="keep pictures in files and name them in the row",
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            yield where, parse_line(line, where)


def _json(path: Path) -> Read:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", where=str(path), do="save the file as UTF-8") from error
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(
            "the file does not start with '['",
            where=f"{path}:1",
            allowed="a JSON list of objects",
            do="name the file .jsonl when it has one object per line",
        )
    position, line, counted = _skip(text, position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            start = position
            row, position = _DECODER.raw_decode(text, position)
            _whole(row, text[start:position])
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"broken JSON: {getattr(error, 'msg', error)}",
                where=f"{path}:{getattr(error, 'lineno', line)}",
                do="mend the file at that line, or write it again",
            ) from error
        yield where, row if isinstance(row, dict) else _no_object(row, where)
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(
                "broken JSON: ',' or ']' expected",
                where=f"{path}:{1 + text.count(chr(10), 0, position)}",
                do="mend the file at that line, or write it again",
            )


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path) -> Read:
    csv.field_size_limit(min(sys.maxsize, MAX_LINE_BYTES))
    with path.open("r", encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        line = 2
        try:
            names = reader.fieldnames or ()
            if twice := sorted({name for name in names if list(names).count(name) > 1}):
                raise DataError(f"the column '{twice[0]}' is given twice", where=f"{path}:1", do="rename one of them")
            for row in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if None in row or None in row.values():
                    yield where, DataError(f"the row has not {len(reader.fieldnames or ())} fields", where=where)
                else:
                    yield where, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"broken CSV: {error}",
                where=f"{path}:{reader.line_num}",
                do="mend the file at that line, or write it again",
            ) from error


def _parquet(path: Path) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"broken parquet file: {error}", where=str(path), do="write the file again from its source"
        ) from error


def _folder(path: Path) -> Read:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f"the folder cannot be read by the datasets library: {error}",
            where=str(path),
            do="give a folder written by Dataset.save_to_disk, or a .jsonl/.json/.parquet/.csv file",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            "the folder holds several splits",
            where=str(path),
            allowed=choices(str(path / str(name)) for name in loaded),
            do="name one split's folder",
        )
    for name, feature in loaded.features.items():
        # Encoded bytes instead of decoded media: the caps of media.py come before any decoding.
        for medium in (datasets.Image, datasets.Audio, datasets.Video):
            if isinstance(feature, medium):
                loaded = loaded.cast_column(name, medium(decode=False))
            elif isinstance(getattr(feature, "feature", None), medium):
                loaded = loaded.cast_column(name, datasets.List(medium(decode=False)))
    for number, row in enumerate(loaded, start=1):
        yield f"{path}:{number}", dict(row)
