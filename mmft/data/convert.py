"""Samples written as a data set of their own: rows, and the media beside or in them, nothing else needed.

`messages` and `llava`: a folder of rows.jsonl and media/; `parquet`: one file with the media as bytes; `webdataset`: a
folder of tar shards. What is read back has the fingerprint of what was written.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmft.data.media import frames_of, media_digest, read_bytes
from mmft.data.sample import MediaRef, Sample
from mmft.errors import DataError, choices
from mmft.files import atomic_folder, to_json, write_bytes

FORMS = ("messages", "llava", "parquet", "webdataset")
ROWS_PER_SHARD = 1000
_ENDINGS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "png"), (0, b"\xff\xd8\xff", "jpg"), (0, b"GIF8", "gif"), (8, b"WEBP", "webp"), (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"), (0, b"MM\0*", "tif"), (8, b"WAVE", "wav"), (0, b"fLaC", "flac"), (0, b"OggS", "ogg"),
    (0, b"ID3", "mp3"), (0, b"\xff\xfb", "mp3"), (8, b"AVI ", "avi"), (0, b"\x1aE\xdf\xa3", "mkv"), (4, b"ftyp", "mp4"),
)  # fmt: skip


def write_samples(samples: Sequence[Sample], out: Path, *, to: str, progress: Any = lambda _: None) -> None:
    """Write `samples` to the new file or folder `out`. Raises DataError for an unknown form, for what a form cannot
    hold (captions and tables have no LLaVA turns, a shard no columns), for one that is there, for unreadable media."""
    if to not in FORMS:
        raise DataError(f"'{to}' is no form", where="--to", allowed=choices(FORMS, word=to), do="mend it")
    if out.exists():
        raise DataError("there is something already", where=str(out), do="name a new file or folder")
    if to == "parquet":
        return _parquet(samples, out, progress)
    with atomic_folder(out) as folder:
        if to == "webdataset":
            for start in range(0, len(samples), ROWS_PER_SHARD):
                _shard(samples[start : start + ROWS_PER_SHARD], folder, start, progress)
            return None
        (folder / "media").mkdir()
        lines = []
        for sample in samples:
            lines.append(to_json(row_of(sample, to, lambda ref: _beside(ref, folder))) + "\n")
            progress(1)
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return None


def row_of(sample: Sample, to: str, place: Any) -> dict[str, Any]:
    """The row of a sample; `place` makes the value that stands for a medium."""
    if sample.cells:
        if to == "llava":
            raise DataError("a table has no turns", where=sample.where, allowed="--to messages or parquet")
        cells = {
            name: _held(cell.value, place) if isinstance(cell.value, MediaRef) else cell.value
            for name, cell in sample.cells.items()
        }
        return {"id": sample.id, **cells}
    row: dict[str, Any] = {"id": sample.id}
    if not sample.turns:
        if to == "llava":
            raise DataError("a caption has no question", where=sample.where, allowed="--to messages or parquet")
        row |= {sample.media[0].kind: _held(sample.media[0], place), "captions": list(sample.answers)}
        row |= {"negatives": list(sample.negatives)} if sample.negatives else {}
        tags = dict(sample.tags)
        group = tags.pop("group", None)
        return row | ({"group": group} if group is not None else {}) | ({"tags": tags} if tags else {})
    if to == "llava":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        row["conversations"] = [
            {
                "from": names[turn.role],
                "value": "".join(piece.text if piece.kind == "text" else f"<{piece.kind}>" for piece in turn.pieces),
            }
            for turn in sample.turns
        ]
    else:
        row["messages"] = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": piece.text} if piece.kind == "text" else {"type": piece.kind}
                    for piece in turn.pieces
                ],
            }
            for turn in sample.turns
        ]
    for kind in ("image", "audio", "video"):
        media = [_held(ref, place) for ref in sample.media if ref.kind == kind]
        row |= {f"{kind}s": media} if media else {}
    row |= {"answers": list(sample.answers)} if sample.answers else {}
    return row | ({"tags": dict(sample.tags)} if sample.tags else {})


def _held(ref: MediaRef, place: Any) -> Any:
    frames = frames_of(ref)
    return [place(frame) for frame in frames] if frames else place(ref)


def _ending(data: bytes, ref: MediaRef) -> str:
    known = next((end for at, magic, end in _ENDINGS if data[at : at + len(magic)] == magic), None)
    return known or {"image": "png", "audio": "wav", "video": "mp4"}[ref.kind]


def _beside(ref: MediaRef, folder: Path) -> str:
    data = read_bytes(ref)
    name = f"media/{media_digest(ref)[:20]}.{_ending(data, ref)}"
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


def _bytes(ref: MediaRef) -> dict[str, Any]:
    data = read_bytes(ref)
    return {"bytes": data, "path": f"{media_digest(ref)[:20]}.{_ending(data, ref)}"}


def _parquet(samples: Sequence[Sample], out: Path, progress: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for sample in samples:
        rows.append(row_of(sample, "messages", _bytes))
        progress(1)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, buffer.getvalue().to_pybytes())


def _shard(samples: Sequence[Sample], folder: Path, start: int, progress: Any) -> None:
    with tarfile.open(folder / f"{start // ROWS_PER_SHARD:06d}.tar", "w") as file:
        for at, sample in enumerate(samples, start=start):
            for name, data in _members(sample):
                info = tarfile.TarInfo(f"{at:09d}.{name}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
            progress(1)


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    if sample.cells:
        raise DataError("a shard has no columns", where=sample.where, allowed="--to messages or parquet")
    media: list[tuple[str, bytes]] = []
    counts: dict[str, int] = {}

    def place(ref: MediaRef) -> str:
        data = read_bytes(ref)
        number = counts[ref.kind] = counts.get(ref.kind, -1) + 1
        media.append((f"{number}.{_ending(data, ref)}" if sample.turns else _ending(data, ref), data))
        return ""

    if any(frames_of(ref) for ref in sample.media):
        raise DataError("a shard has no lists of frames", where=sample.where, allowed="--to messages or parquet")
    row = row_of(sample, "messages", place)
    for kind in ("image", "audio", "video"):
        row.pop(kind, None)
        row.pop(f"{kind}s", None)
    yield from media
    yield "json", to_json(row).encode()
