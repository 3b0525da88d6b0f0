"""Tensors on disk by content address: many readers, one writer for each file, a bound, and no torn entry is ever read.

    slabs = Slabs(folder, limit=20 * 10**9, root=cache)
    slabs.put(key, {"pooler_output": tensor})      # a single append
    slabs.get(key)                                 # the tensors, or None

A slab is a file of entries: magic, key, sha256 of the rest, lengths, JSON head, tensors, each padded to 64 bytes. Only
the process that made a slab appends to it; everybody maps it into memory and finds new entries by its growth. Every
read checks the entry's sha256, so that what a kill, a full disk or a power cut left behind is a miss.

Bound: before a new slab the files below `root` that nobody used for longest go, but none that was used since an hour
before this process began; when that does not make room nothing more is stored. (Least-recently-used alone would throw
out what an epoch needs next.) Price: a hash a read, about 0.5 ms a megabyte; on a full cache, the tower's forward as
without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import struct
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmft.files import free_bytes
from mmft.paths import cache_root

SUFFIXES = (".slab", ".safetensors")
"""Files that a cache may throw out."""
SLAB_BYTES = 64 << 20
RESERVE = 1 << 30
"""Bytes of the disk that are left free."""
GRACE = 3600.0
"""Seconds since its last use in which nothing is thrown out: another run may be reading it."""
_MAGIC = b"mmftslb1"
_HEAD = struct.Struct("<8s32s32sIQ")
_ALIGN = 64
_LOOK_AGAIN = 1.0
_TOUCH_AGAIN = 60.0


@dataclass(frozen=True, slots=True)
class _Place:
    slab: Path
    start: int
    end: int


class Slabs:
    """The entries of one folder. Copies in forked processes may read; one process of its own `put`s."""

    def __init__(self, folder: Path, *, limit: int, root: Path | None = None) -> None:
        self.folder, self.root, self.limit = folder, root or folder, limit
        self.full: str | None = None
        self.torn = 0
        self._born = time.time()
        self._places: dict[bytes, _Place] = {}
        self._scanned: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._touched: dict[Path, float] = {}
        self._looked = 0.0
        self._writing: tuple[Path, int] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._look()

    def __len__(self) -> int:
        return len(self._places)

    # -- reading ----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was stored under a hex sha256; None when nothing whole is there. The tensors are read-only views."""
        address = bytes.fromhex(key)
        if address not in self._places and time.monotonic() - self._looked > _LOOK_AGAIN:
            self._look()
        place = self._places.get(address)
        if place is None:
            return None
        found = self._read(place, address)
        if found is None:
            self.torn += 1
            del self._places[address]
        return found

    def _read(self, place: _Place, key: bytes) -> dict[str, Tensor] | None:
        try:
            view = memoryview(self._map(place))[place.start : place.end]
        except (OSError, ValueError):  # thrown out by another process, or cut short
            return None
        if len(view) < place.end - place.start:
            return None
        _, own, digest, head, body = _HEAD.unpack(view[: _HEAD.size])
        rest = view[_HEAD.size : _HEAD.size + head + body]
        if own != key or hashlib.sha256(rest).digest() != digest:
            return None
        self._touch(place.slab)
        return _tensors(rest, head)

    def _map(self, place: _Place) -> mmap.mmap:
        held = self._maps.get(place.slab)
        if held is None or len(held) < place.end:
            with place.slab.open("rb") as file:
                held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[place.slab] = held
        return held

    def _touch(self, slab: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(slab, -math.inf) > _TOUCH_AGAIN:
            self._touched[slab] = now
            with contextlib.suppress(OSError):
                os.utime(slab)

    def _look(self) -> None:
        """Find entries of new slabs, and of known ones that have grown."""
        self._looked = time.monotonic()
        try:
            entries = sorted(os.scandir(self.folder), key=lambda one: one.name)
        except OSError:  # the whole cache was deleted: everything is a miss
            return
        for entry in entries:
            path = Path(entry.path)
            if path.suffix == ".slab" and entry.stat().st_size > self._scanned.get(path, 0):
                with contextlib.suppress(OSError):
                    self._scan(path)

    def _scan(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            at = self._scanned.get(path, 0)
            for key, end in _entries(file.fileno(), at, size):
                self._places.setdefault(key, _Place(path, at, end))
                at = end
            self._scanned[path] = at

    # -- writing ----------------------------------------------------------------------------------------------------

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Store tensors under a hex sha256, unless the cache or the disk is full (`full` says so); no error leaves."""
        address = bytes.fromhex(key)
        if self.full or address in self._places:
            return False
        data = _entry(address, tensors)
        try:
            path, at = self._room(len(data))
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                written = os.write(handle, data)
            finally:
                os.close(handle)
        except OSError as error:
            return self._stop(error.strerror or str(error))
        if written < len(data):
            return self._stop("the disk is full")
        self._writing = (path, at + len(data))
        self._places[address] = _Place(path, at, at + len(data))
        self._scanned[path] = at + len(data)
        return True

    def _stop(self, why: str) -> bool:
        self.full = f"nothing more is stored: {why}"
        warnings.warn(f"{self.folder}: {self.full}", stacklevel=3)
        return False

    def _room(self, size: int) -> tuple[Path, int]:
        """The slab that is appended to, and where it ends. Raises OSError when there is no room."""
        slab = max(size, min(SLAB_BYTES, self.limit // 8))
        if self._writing is not None and self._writing[1] + size <= slab and self._writing[0].is_file():
            return self._writing
        evict(self.root, limit=self.limit - slab, since=self._born - GRACE)
        if held(self.root) + slab > self.limit:
            raise OSError(28, f"the cache holds its {self.limit:,} bytes (MMFT_CACHE_SIZE)")
        if free_bytes(self.root) < RESERVE + slab:
            raise OSError(28, f"less than {RESERVE:,} bytes are free on its disk")
        number = 0
        while True:
            path = self.folder / f"{os.uname().nodename}-{os.getpid()}-{number}.slab"
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                number += 1
                continue
            return path, 0


def _entry(key: bytes, tensors: Mapping[str, Tensor]) -> bytes:
    pieces, table, at = [], [], 0
    for name, value in tensors.items():
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        table.append([name, str(value.dtype).removeprefix("torch."), list(value.shape), at, len(raw)])
        pieces += [raw, bytes(-len(raw) % _ALIGN)]
        at += len(raw) + -len(raw) % _ALIGN
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-(_HEAD.size + len(head)) % _ALIGN)
    rest = head + b"".join(pieces)
    return _HEAD.pack(_MAGIC, key, hashlib.sha256(rest).digest(), len(head), at) + rest


def _entries(handle: int, at: int, size: int) -> Iterator[tuple[bytes, int]]:
    """(key, end) of the entries from `at` on that are long enough; none behind one that is not."""
    while at + _HEAD.size <= size:
        magic, key, _, head, body = _HEAD.unpack(os.pread(handle, _HEAD.size, at))
        at += _HEAD.size + head + body
        if magic != _MAGIC or at > size:
            return
        yield key, at


def _tensors(rest: memoryview, head: int) -> dict[str, Tensor]:
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        for name, dtype, shape, at, size in json.loads(bytes(rest[:head])):
            kind = getattr(torch, dtype)
            data = rest[head + at : head + at + size]
            found[name] = torch.frombuffer(data, dtype=kind).view(shape) if size else torch.zeros(shape, dtype=kind)
    return found


# ---------------------------------------------------------------- the bound


def _files(root: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, path) of everything that may be thrown out, the longest unused first."""
    found = []
    for path in root.rglob("*"):
        if path.suffix in SUFFIXES:
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
    return sorted(found, key=lambda one: (one[0], str(one[2])))


def held(root: Path) -> int:
    """Bytes of the cache below `root`."""
    return sum(size for _, size, _ in _files(root))


def evict(root: Path, *, limit: int, since: float = math.inf) -> list[Path]:
    """Delete the files that were not used for longest until at most `limit` bytes are left, none used after `since`
    (seconds of the clock); the paths that went. What another process has open it keeps."""
    files = _files(root)
    total, gone = sum(size for _, size, _ in files), []
    for used, size, path in files:
        if total <= limit or used >= since:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size
            gone.append(path)
    return gone


def cache_folder() -> Path:
    """`$MMFT_CACHE/features` (`~/.cache/mmft/features`)."""
    return cache_root() / "features"
