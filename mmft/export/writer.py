"""Weight files that a thread hashes and syncs while the next is made, and a folder whose manifest needs no second read.

Digests are BLAKE3 (github.com/BLAKE3-team/BLAKE3-specs): as strong as sha256 and 4 to 10 times as fast on one core, so
that a checkpoint's digest costs less than writing it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmft.digests import blake3_hasher
from mmft.errors import CheckpointError, ExportError
from mmft.export.shards import CODES, INDEX, Output
from mmft.files import scratch_folder, sync_path, write_json, write_manifest

Known = dict[str, dict[str, int | str]]
"""File name -> its manifest entry."""

_AHEAD = 16 << 20  # bytes that may wait to be hashed
_FLUSH = 64 << 20  # bytes after which the kernel is asked to begin writing them to the disk
_SYNCING = 4  # files that may wait for the disk while others are written


@dataclass(slots=True)
class _Piece:
    data: memoryview
    offset: int
    taken: bool = False  # by the thread that writes it


class HashingWriter:
    """A new file. Pieces must not change after they are given; `finish` waits until all is hashed, written and synced.

    A thread hashes, outside of Python's lock, while the caller reads and computes. Whoever of the two has time writes:
    the thread what it has just hashed, the caller while the thread is behind. So two cores share hash, sums and
    writes, whichever is the longest. After `close` the thread syncs the file while the caller goes on with the next.
    """

    def __init__(self, path: Path) -> None:
        self._waiting: deque[_Piece] = deque()
        self._held = 0
        self._change = threading.Condition()
        self._closed = self._dropped = False
        self._failed: OSError | None = None
        self._begun = 0
        self._digest = blake3_hasher()
        self._size = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def write(self, data: memoryview) -> None:
        """Take one piece, and write one that waits while there are too many. Raises OSError of either thread."""
        if not len(data):
            return
        with self._change:
            self._waiting.append(_Piece(data, self._size))
            self._held += len(data)
            self._size += len(data)
            self._change.notify_all()
        while True:
            with self._change:
                if self._failed is not None:
                    raise self._failed
                if self._held <= _AHEAD:
                    return
                piece = next((piece for piece in self._waiting if not piece.taken), None)
                if piece is None:
                    self._change.wait()
                    continue
                piece.taken = True
            self._put(piece)

    def close(self, *, keep: bool = True) -> None:
        """No more pieces will come; with `keep` false those that wait are dropped."""
        with self._change:
            self._closed = True
            if not keep:
                self._dropped = True
                self._waiting.clear()
            self._change.notify_all()

    def finish(self) -> dict[str, int | str]:
        """Wait for the thread; the manifest entry of the file. Raises the OSError that stopped it."""
        self._thread.join()
        os.close(self._handle)  # not in the thread: `write` may be at it when the thread fails
        if self._failed is not None:
            raise self._failed
        return {"bytes": self._size, "blake3": self._digest.hexdigest()}

    def _run(self) -> None:
        try:
            while self._next():
                pass
            if not self._dropped:
                os.fsync(self._handle)
        except OSError as error:
            with self._change:
                self._failed = error
                self._waiting.clear()
                self._change.notify_all()

    def _next(self) -> bool:
        """Hash, and if nobody has, write the oldest piece; False when there is none and none will come."""
        with self._change:
            while not self._waiting and not self._closed:
                self._change.wait()
            if not self._waiting:
                return False
            piece = self._waiting[0]
        self._digest.update(piece.data)
        with self._change:
            mine, piece.taken = not piece.taken, True
        if mine:
            self._put(piece)
        self._flush(piece.offset)
        with self._change:
            if self._waiting:
                self._waiting.popleft()
            self._held -= len(piece.data)
            self._change.notify_all()
        return True

    def _put(self, piece: _Piece) -> None:
        done = 0
        while done < len(piece.data):
            done += os.pwrite(self._handle, piece.data[done:], piece.offset + done)

    def _flush(self, upto: int) -> None:
        if upto - self._begun >= _FLUSH:
            _begin_writeback(self._handle, self._begun, upto - self._begun)
            self._begun = upto


def _begin_writeback(handle: int, start: int, count: int) -> None:
    # On Linux this starts the write-back of the range and drops what is clean from the cache, which keeps a large
    # merge from filling memory with dirty pages and makes the fsync at the end short. Elsewhere it is not there.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, start, count, os.POSIX_FADV_DONTNEED)


def write_shards(
    folder: Path, shards: Mapping[str, Sequence[Output]], produce: Callable[[Output], Iterator[memoryview]]
) -> Known:
    """Write safetensors files, each tensor as `produce` yields its bytes, and their index if they are several.

    Returns the files' manifest entries; all are synced. Up to four files wait for the disk while others are made.
    Raises ExportError when `produce` yields another number of bytes than the output's shape needs.
    """
    known: Known = {}
    pending: deque[tuple[str, HashingWriter]] = deque()
    try:
        for file, outputs in shards.items():
            while len(pending) >= _SYNCING:
                name, oldest = pending.popleft()
                known[name] = oldest.finish()
            writer = HashingWriter(folder / file)
            pending.append((file, writer))
            _fill(writer, outputs, produce)
            writer.close()
        while pending:
            name, oldest = pending.popleft()
            known[name] = oldest.finish()
    except BaseException:
        for _, writer in pending:
            writer.close(keep=False)
        for _, writer in pending:
            with contextlib.suppress(OSError):
                writer.finish()
        raise
    if len(shards) > 1:
        write_json(folder / INDEX, index_json(shards))
    return known


def _fill(writer: HashingWriter, outputs: Sequence[Output], produce: Callable[[Output], Iterator[memoryview]]) -> None:
    # by falling element size, so that all tensors stay aligned
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)  # stable
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in ordered:
        header[output.name] = {
            "dtype": CODES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [at, at + output.nbytes],
        }
        at += output.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writer.write(memoryview(len(text).to_bytes(8, "little") + text))
    for output in ordered:
        written = 0
        for piece in produce(output):
            writer.write(piece)
            written += len(piece)
        if written != output.nbytes:
            raise ExportError(
                f"tensor {output.name}: {written} bytes came, {output.nbytes} were planned",
                do="report this; the base's files may have changed meanwhile",
            )


def index_json(shards: Mapping[str, Sequence[Output]]) -> dict[str, object]:
    """The index of a sharded checkpoint, with the true number of bytes."""
    flat = [(output, name) for name, outputs in shards.items() for output in outputs]
    return {
        "metadata": {
            "total_size": sum(output.nbytes for output, _ in flat),
            "total_parameters": sum(math.prod(output.shape) for output, _ in flat),
        },
        "weight_map": {output.name: name for output, name in sorted(flat, key=lambda pair: pair[0].name)},
    }


@contextlib.contextmanager
def hashed_folder(final: Path) -> Iterator[tuple[Path, Known]]:
    """`files.atomic_folder` for large files: those whose manifest entry the block enters are not read again.

    Such files must be synced already. Raises CheckpointError when `final` exists or the disk is full.
    """
    final = Path(final)
    with scratch_folder(final.parent, final.name) as folder:
        known: Known = {}
        try:
            yield folder, known
            write_manifest(folder, known=known)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {final.name}: {error}",
                where=str(final),
                do="free space there, or write to another disk; nothing older was touched",
            ) from error
        if final.exists() or final.is_symlink():
            raise CheckpointError(f"{final.name} exists already", where=str(final), do="delete it, or write elsewhere")
        os.rename(folder, final)
        sync_path(final.parent)
