"""A data set without some of its rows, in the file kind it came in."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator
from pathlib import Path

from mmft.data.readers import read_rows
from mmft.errors import DataError
from mmft.files import scratch_folder, sync_path, to_json, write_bytes, write_parts

KEPT = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def write_clean(path: Path, out: Path, bad: Collection[str]) -> int:
    """Copy a file of rows to `out` without those at the places `bad` (`file:line`); returns how many stay.

    Lines of .jsonl are copied byte for byte, one at a time; .json, .csv and .parquet keep the rows' values, and parquet
    its row groups, one of which is held. Raises DataError for
    another kind of source (`mmft convert` makes rows of it) and when `out` is the source itself.
    """
    form = path.suffix.lower()
    if not path.is_file() or form not in KEPT:
        raise DataError(
            "a clean copy is written of a file of rows only",
            where=str(path),
            allowed=", ".join(KEPT),
            do="mmft convert the set first, then check and fix what that wrote",
        )
    if out.exists() and out.resolve() == path.resolve():
        raise DataError("the clean set would overwrite its source", where=str(out), do="name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    if form in (".jsonl", ".ndjson"):
        return _lines(path, out, bad)
    if form == ".parquet":
        return _parquet(path, out, bad)
    rows = [row for where, row in read_rows(path) if where not in bad and not isinstance(row, DataError)]
    if form == ".json":
        write_bytes(out, (to_json(rows, indent=1) + "\n").encode())
        return len(rows)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out, text.getvalue().encode())
    return len(rows)


def _parquet(path: Path, out: Path, bad: Collection[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = before = 0
    with scratch_folder(out.parent, out.name) as scratch:
        made = scratch / "rows.parquet"
        with pq.ParquetFile(path) as file, pq.ParquetWriter(made, file.schema_arrow) as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                kept = [at for at in range(table.num_rows) if f"{path}:{before + at + 1}" not in bad]
                count, before = count + len(kept), before + table.num_rows
                writer.write_table(table.take(pa.array(kept, pa.int64())))
        sync_path(made)
        made.replace(out)
    return count


def _lines(path: Path, out: Path, bad: Collection[str]) -> int:
    count = 0

    def kept() -> Iterator[bytes]:
        nonlocal count
        with path.open("rb") as stream:
            for at, line in enumerate(stream, 1):
                if line.strip() and f"{path}:{at}" not in bad:
                    count += 1
                    yield line if line.endswith(b"\n") else line + b"\n"

    write_parts(out, kept(), needed=path.stat().st_size)
    return count
