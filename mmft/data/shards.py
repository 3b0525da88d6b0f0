"""webdataset shards: tar files whose members share a key, read as a stream, one row per key."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmft.data.media import MAX_FILE_BYTES, kind_of_name
from mmft.data.readers import Read, Row, parse_json
from mmft.data.sample import MediaRef
from mmft.errors import DataError

MAX_TEXT_BYTES = 1_000_000
_TEXTS = {
    "txt": "text",
    "text": "text",
    "caption": "caption",
    "cls": "label",
    "question": "question",
    "answer": "answer",
}


def is_shards(path: Path) -> bool:
    """A .tar file, or a folder that holds some (and no picture)."""
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def read_shards(path: Path) -> Read:
    """One row per key, in the order of shards and members: media (several of a kind as `0.png`, `1.png`: `images`),
    `text` of .txt, `label` of .cls, the keys of a .json, and `id`, the key.

    A medium is not read but named by its place in the shard, so that a set need not fit into memory and every row can
    be opened again by itself. Nothing is unpacked to disk; only plain members are taken, links and devices are bad
    rows. Raises DataError for a shard that is no tar file or is cut off.
    """
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    for shard in shards:
        yield from _shard(shard)


def _shard(shard: Path) -> Iterator[tuple[str, Row | DataError]]:
    if not shard.is_file():  # opening a pipe would wait for ever
        raise DataError("the shard is not a regular file", where=str(shard), do="name a file, or take it away")
    try:
        with tarfile.open(shard, "r:") as file:
            yield from rows_of_tar(file, shard)
            check_end(file)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"broken tar file: {error}", where=str(shard), do="write the shard again") from error


def check_end(file: tarfile.TarFile) -> None:
    """Raise ReadError for a shard whose members were all read and that goes on with no block of zeros: it is cut off,
    and what is missing would not be missed."""
    stream = file.fileobj
    assert stream is not None
    stream.seek(file.offset)  # type: ignore[attr-defined]
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it ends without an end mark, so it is cut off")


def key_of(name: str) -> tuple[str, str]:
    """(key, ending) of a member: its path up to the first dot of its name, and what follows."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}".lstrip("/"), ending.lower()


def rows_of_tar(file: tarfile.TarFile, shard: Path) -> Iterator[tuple[str, Row | DataError]]:
    """The rows of an opened shard, from where it stands; its path is what they are named by. Raises TarError."""
    number, key = 0, None
    row: Row = {}
    bad: DataError | None = None
    for member in file:
        if member.isdir():
            continue
        found, ending = key_of(member.name)
        if key is not None and found != key:
            yield f"{shard}:{number}", bad or row
        if found != key:
            number, key, row, bad = number + 1, found, {"id": found}, None
        try:
            row |= _member(file, member, ending, row, shard, f"{shard}:{number}")
        except DataError as error:
            bad = error
    if key is not None:
        yield f"{shard}:{number}", bad or row


def _member(
    file: tarfile.TarFile, member: tarfile.TarInfo, ending: str, row: Row, shard: Path, where: str
) -> dict[str, Any]:
    if not member.isreg() or member.issparse():
        raise DataError(f"'{member.name}' is a link or a device", where=where, allowed="plain files in a shard")
    kind = kind_of_name(f"x.{ending}")
    if kind is None and ending != "json" and ending not in _TEXTS:
        return {}
    most = MAX_FILE_BYTES if kind else MAX_TEXT_BYTES
    if member.size > most:
        raise DataError(f"'{member.name}' has {member.size} bytes", where=where, allowed=f"at most {most}")
    if kind is not None:
        ref = MediaRef(kind, path=shard.name, root=shard.parent, span=(member.offset_data, member.size))
        if ending.split(".")[0].isdigit():
            return {f"{kind}s": [*row.get(f"{kind}s", ()), ref]}
        if kind in row:
            raise DataError(f"two members give the {kind} of one row", where=where, do="number them: 0.png, 1.png")
        return {kind: ref}
    stream = file.extractfile(member)
    data = stream.read() if stream is not None else b""
    try:
        text = data.decode("utf-8")
        found = parse_json(text) if ending == "json" else {_TEXTS[ending]: text.strip()}
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{member.name}' cannot be read: {error}", where=where, allowed="UTF-8 text, JSON") from error
    if not isinstance(found, dict):
        raise DataError(f"'{member.name}' holds a {type(found).__name__}", where=where, allowed="a JSON object")
    # A medium that is a member of its own wins over the file name that the json tells; its id wins over the key.
    return {name: value for name, value in found.items() if name not in row or name == "id"}
