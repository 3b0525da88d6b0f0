"""A file that a thread hashes while it is written, and a folder whose manifest needs no second read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mmft.errors import CheckpointError
from mmft.files import MANIFEST, scratch_folder, sha256_bytes, sha256_file, sync_path, to_json, write_json

_AHEAD = 16 << 20  # bytes that may wait to be hashed
_FLUSH = 64 << 20  # bytes after which the kernel is asked to begin writing them to the disk


@dataclass(slots=True)
class _Piece:
    data: memoryview
    offset: int
    taken: bool = False  # by the thread that writes it


class HashingWriter:
    """A new file, synced when it is closed; `size` and `sha256` hold then. Pieces must not change after they are given.

    A thread hashes, outside of Python's lock, while the caller reads and computes. Whoever of the two has time writes:
    the thread what it has just hashed, the caller while the thread is behind. So two cores share hash (about 1 s per
    GB with SHA instructions), sums and writes, whichever is the longest.
    """

    def __init__(self, path: Path) -> None:
        self._waiting: deque[_Piece] = deque()
        self._held = 0
        self._change = threading.Condition()
        self._closed = False
        self._failed: OSError | None = None
        self._begun = 0
        self._digest = hashlib.sha256()
        self.size = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)
        self._thread.start()

    @property
    def sha256(self) -> str:
        """Hex digest of all that was written."""
        return self._digest.hexdigest()

    def write(self, data: memoryview) -> None:
        """Take one piece, and write one that waits while there are too many. Raises OSError of either thread."""
        if not len(data):
            return
        with self._change:
            self._waiting.append(_Piece(data, self.size))
            self._held += len(data)
            self.size += len(data)
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

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._change:
            self._closed = True
            if error is not None:
                self._waiting.clear()
            self._change.notify_all()
        self._thread.join()
        try:
            if error is None:
                if self._failed is not None:
                    raise self._failed
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if not self._waiting:
                    return
                piece = self._waiting[0]
            self._digest.update(piece.data)
            with self._change:
                mine, piece.taken = not piece.taken, True
            try:
                if mine:
                    self._put(piece)
                self._flush(piece.offset)
            except OSError as error:
                with self._change:
                    self._failed = error
                    self._waiting.clear()
                    self._change.notify_all()
                return
            with self._change:
                if self._waiting:
                    self._waiting.popleft()
                self._held -= len(piece.data)
                self._change.notify_all()

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


@contextlib.contextmanager
def hashed_folder(final: Path) -> Iterator[tuple[Path, dict[str, tuple[int, str]]]]:
    """`files.atomic_folder` for large files: what the block enters as name -> (bytes, sha256) is not read again.

    Such files must be synced already. Raises CheckpointError when `final` exists or the disk is full.
    """
    final = Path(final)
    with scratch_folder(final.parent, final.name) as folder:
        known: dict[str, tuple[int, str]] = {}
        try:
            yield folder, known
            _write_manifest(folder, known)
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


def _write_manifest(folder: Path, known: dict[str, tuple[int, str]]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    probe = folder / ".mode.tmp"
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    entries = {}
    for path in files:
        path.chmod(mode)
        name = path.relative_to(folder).as_posix()
        if name not in known:
            sync_path(path)
        size, digest = known.get(name) or (path.stat().st_size, sha256_file(path))
        if path.stat().st_size != size:
            raise CheckpointError(f"{name} has changed while it was written", where=str(path), do="merge again")
        entries[name] = {"bytes": size, "sha256": digest}
    write_json(folder / MANIFEST, {"files": entries, "digest": sha256_bytes(to_json(entries).encode())})
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_path(path)
