"""Files of rows of which any row is read by its number: lines, tar shards and parquet files, opened once and kept.

`scan` goes through a file once and writes down where its rows begin; `Shard` gives row n from there and holds no other
(of parquet: the row groups last read, `HELD_BYTES` at most). An opened shard stays readable when its file is deleted.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmft.data.media import MAX_FILE_BYTES
from mmft.data.readers import MAX_LINE_BYTES, Row, parse_line
from mmft.data.sample import MediaRef, Sample
from mmft.data.shards import check_end, key_of, rows_of_tar
from mmft.digests import sha256_file
from mmft.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".tar", ".parquet")
HELD_BYTES = 256 << 20
_WRITTEN = 1 << 16


@dataclass(frozen=True)
class Scanned:
    """What is known of a file: its rows, its digest, and whether some of its lines are empty (those are no rows)."""

    rows: int
    sha256: str
    gaps: bool = False


def scan(path: Path, kept: Path) -> Scanned:
    """Write to `kept`, as int64, where the rows of a file begin: bytes for lines and tar shards (there of a row's first
    member), for parquet the rows before each row group and in all. Constant memory. Raises DataError for a file that
    is broken as a whole."""
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as out:
            if path.suffix in (".jsonl", ".ndjson"):
                found = _scan_lines(path, out)
            else:
                places = _members(path) if path.suffix == ".tar" else _groups(path)
                rows = _write(places, out)
                rows = rows if path.suffix == ".tar" else int(_groups(path)[-1])
                found = Scanned(rows, sha256_file(path))
        os.replace(temporary, kept)
    except (tarfile.TarError, OSError, EOFError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"broken file of rows: {error}", where=str(path), do="write the file again") from error
    return found


def _write(places: Iterator[int] | list[int], out: Any) -> int:
    buffer, count = array("q"), 0
    for place in places:
        buffer.append(place)
        count += 1
        if len(buffer) == _WRITTEN:
            buffer.tofile(out)
            del buffer[:]
    buffer.tofile(out)
    return count


def _scan_lines(path: Path, out: Any) -> Scanned:
    digest, gaps = hashlib.sha256(), False

    def begins() -> Iterator[int]:
        nonlocal gaps
        at, going_on = 0, False
        with path.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                digest.update(line)
                if not going_on and line.strip():
                    yield at
                gaps = gaps or not (going_on or line.strip())
                at, going_on = at + len(line), not line.endswith(b"\n")

    rows = _write(begins(), out)
    return Scanned(rows, digest.hexdigest(), gaps)


def _members(path: Path) -> Iterator[int]:
    key: str | None = None
    with tarfile.open(path, "r:") as file:
        while (member := file.next()) is not None:
            file.members = []  # type: ignore[attr-defined]  # it would keep them all
            if not member.isdir() and (here := key_of(member.name)[0]) != key:
                yield member.offset
                key = here
        check_end(file)


def _groups(path: Path) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except pa.ArrowException as error:
        raise OSError(str(error)) from error
    return [0, *np.cumsum(rows).tolist()]


class Shard:
    """One opened file. `name` is how rows are named; with `inside` the media that lie in the file are read into the
    rows, because the file may be deleted (else a row names their place)."""

    def __init__(self, path: Path, places: Path, scanned: Scanned, *, name: str, inside: bool = False) -> None:
        self.path, self.name, self.scanned, self.inside = path, name, scanned, inside
        self._file = path.open("rb")
        self._places = np.memmap(places, np.int64, mode="r") if scanned.rows else np.zeros(0, np.int64)
        self._held: OrderedDict[int, Any] = OrderedDict()

    def close(self) -> None:
        """Let go of the file."""
        self._held.clear()
        self._file.close()

    def row(self, number: int) -> tuple[str, Row | DataError]:
        """(`file:line`, the row), or in its place the DataError of a broken one."""
        where = f"{self.name}:{number + 1}"
        if self.scanned.gaps:
            where = f"{self.name}: byte {self._places[number]}"
        try:
            if self.path.suffix == ".parquet":
                return where, self._of_group(number)
            self._file.seek(int(self._places[number]))
            if self.path.suffix == ".tar":
                with tarfile.open(fileobj=self._file, mode="r:") as file:
                    _, row = next(rows_of_tar(file, self.path))
                return where, row if not isinstance(row, DataError) else DataError(row.problems[0].what, where=where)
            line = self._file.readline(MAX_LINE_BYTES + 1)
            if len(line) > MAX_LINE_BYTES:
                return where, DataError(f"the line is longer than {MAX_LINE_BYTES} bytes", where=where)
            return where, parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line, where)
        except (tarfile.TarError, OSError, EOFError, StopIteration) as error:
            return where, DataError(f"broken file of rows: {error}", where=where, do="write the file again")

    def _of_group(self, number: int) -> Row:
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = int(np.searchsorted(self._places, number, side="right")) - 1
        if group not in self._held:
            try:
                self._held[group] = pq.ParquetFile(self._file).read_row_group(group, use_threads=False)
            except pa.ArrowException as error:
                raise OSError(str(error)) from error
            while len(self._held) > 1 and sum(table.nbytes for table in self._held.values()) > HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        row: Row = self._held[group].slice(number - int(self._places[group]), 1).to_pylist()[0]
        return row

    def with_media(self, sample: Sample) -> Sample:
        """The row with those of its media that lie in this file, where it may be deleted."""
        return sample.with_media(self._taken) if self.inside else sample

    def _taken(self, _: int, ref: MediaRef) -> MediaRef:
        if ref.span is None or ref.path != self.path.name:
            return ref
        data = os.pread(self._file.fileno(), min(ref.span[1], MAX_FILE_BYTES), ref.span[0])
        return MediaRef(ref.kind, data=data)
