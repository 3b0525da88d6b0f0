"""Files that are complete or absent: atomic writes, manifests of digests, contained paths, free space, the run lock.

Modes follow the umask (safetensors, for one, writes 0600). Disk errors leave as `CheckpointError`, with bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmft.digests import DIGESTS, digest_file, sha256_bytes, sha256_file
from mmft.errors import CheckpointError, Problem
from mmft.lock import alive, run_lock
from mmft.paths import contained

__all__ = [
    "MANIFEST",
    "append_jsonl",
    "atomic_folder",
    "contained",
    "free_bytes",
    "read_json_file",
    "remove_stale",
    "require_free",
    "run_lock",
    "scratch_folder",
    "sha256_bytes",
    "sha256_file",
    "sync_path",
    "to_json",
    "verify_folder",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
]

MANIFEST = "MANIFEST.json"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<pid>\d+)(?P<extra>-\d+|\.old)?\.tmp$", re.DOTALL)
_counter = itertools.count()
_open_here: set[str] = set()  # temporary folders of this process: that its own pid is alive says nothing about them


# ---------------------------------------------------------------- small writes


def to_json(obj: Any, *, indent: int | None = None) -> str:
    """Strict JSON (NaN is a ValueError); paths, dataclasses, pydantic models, arrays and sets become plain values."""
    return json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    for method in ("tolist", "model_dump"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def write_bytes(path: str | Path, data: bytes) -> None:
    """`write_parts` of one."""
    write_parts(path, (data,), needed=len(data))


def write_parts(path: str | Path, parts: Iterable[bytes], *, needed: int) -> None:
    """Replace `path` by `parts` atomically: temporary sibling, fsync, rename, fsync of the folder.

    `needed`: about how many bytes. Raises CheckpointError when the disk is full or not writable; the old file is then
    untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}.tmp")
    with _disk_errors(path, needed=needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """`write_bytes` of indented JSON with a final newline; key order is kept."""
    write_text(path, to_json(obj, indent=2) + "\n")


def read_json_file(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it cannot be read or is no object."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path), do="restore the file") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.name} holds no JSON object", where=str(path), do="restore the file")
    return found


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Append one JSON line with a single write (not synced); a torn last line of a killed process is closed first."""
    path = Path(path)
    line = (to_json(obj) + "\n").encode("utf-8")
    with _disk_errors(path, needed=len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":
                    line = b"\n" + line
            if stream.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def sync_path(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- space


def _existing(path: str | Path) -> Path:
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def free_bytes(path: str | Path) -> int:
    """Bytes an ordinary user may still write on the disk of `path` (which need not exist yet)."""
    return shutil.disk_usage(_existing(path)).free


def require_free(path: str | Path, needed: int, *, what: str) -> None:
    """Raise CheckpointError unless `needed` bytes are free on the disk of `path`."""
    free = free_bytes(path)
    if free < needed:
        raise CheckpointError(
            f"not enough disk space for {what}: {needed:,} bytes needed, {free:,} bytes free",
            where=str(path),
            do=f"free {needed - free:,} bytes there, or write to another disk (train.output_dir)",
        )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors' Rust writer reports the same errors as text only.
    return any(f"os error {number})" in str(error) for number in _FULL)


@contextlib.contextmanager
def _disk_errors(path: Path, *, needed: int | None = None, only_full: bool = False) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        full = _is_full(error)
        if not full and (only_full or not isinstance(error, OSError)):
            raise
        if not full:
            do = "check that the folder exists and may be written to"
            raise CheckpointError(f"cannot write {path.name}: {error}", where=str(path), do=do) from error
        needs = f"{needed:,} bytes needed, " if needed is not None else ""
        raise CheckpointError(
            f"the disk is full: {needs}{free_bytes(path):,} bytes free",
            where=str(path),
            do="free space (or raise the quota or file size limit) and start again; nothing older was touched",
        ) from error


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def atomic_folder(final: Path, *, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of `final` that becomes `final`, with a manifest, when the block ends well.

    `needed`: bytes it will hold, for the message when the disk is full.
    After an exception the temporary is removed and `final` is as before; after a kill it is found by `remove_stale`.
    Raises CheckpointError if `final` exists and `replace` is false, or if the disk is full.
    Price: one read of all bytes.
    """
    final = Path(final)
    _refuse_existing(final, replace=replace)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    aside = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
    with _disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    _open_here.add(str(temporary.absolute()))
    try:
        with _disk_errors(final, only_full=True, needed=needed):
            yield temporary
        with _disk_errors(final, needed=needed):
            write_manifest(temporary)
            _refuse_existing(final, replace=replace)
            if final.exists():
                os.rename(final, aside)
            os.rename(temporary, final)
            sync_path(final.parent)
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        raise
    finally:
        _open_here.discard(str(temporary.absolute()))


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder `.NAME.PID-N.tmp` in `parent`, deleted when the block ends; after a kill `remove_stale` finds it.

    A block that moves the folder away leaves nothing to delete. Raises CheckpointError if it cannot be made.
    """
    path = Path(parent) / f".{name}.{os.getpid()}-{next(_counter)}.tmp"
    with _disk_errors(path):
        path.mkdir(parents=True)
    _open_here.add(str(path.absolute()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        _open_here.discard(str(path.absolute()))


def _refuse_existing(final: Path, *, replace: bool) -> None:
    if final.is_symlink() or (final.exists() and not (replace and final.is_dir())):
        raise CheckpointError(
            f"{final.name} exists already", where=str(final), do="delete it, or write to another folder"
        )


def _listing(folder: Path) -> dict[str, Path]:
    """All files below `folder` by their name relative to it, manifest aside; CheckpointError on links and devices."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(
                f"{name} is not a regular file", where=str(path), do="delete it or copy the real file"
            )
        if stat.S_ISREG(mode) and name != MANIFEST:
            found[name] = path
    return found


def write_manifest(folder: Path, *, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Sync all files, set their modes by the umask, and write MANIFEST.json (name, bytes, sha256 of each) last.

    `known` holds entries (`bytes`, and `sha256` or `blake3`) of files that are synced already; they are not read again.
    Raises CheckpointError when such a file has another size.
    """
    folder, known = Path(folder), known or {}
    files = _listing(folder)
    mode = _mode_by_umask(folder)
    entries = {}
    for name, path in files.items():
        path.chmod(mode)
        if name not in known:
            sync_path(path)
        entry = known[name] if name in known else {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{name} has changed while it was written", where=str(path), do="start again")
        entries[name] = dict(entry)
    write_json(folder / MANIFEST, {"files": entries, "digest": sha256_bytes(to_json(entries).encode())})
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_path(path)


def _mode_by_umask(folder: Path) -> int:
    # os.umask can only be read by setting it, which would race with other threads; a file's mode tells it as well.
    probe = folder / f".mode.{os.getpid()}-{next(_counter)}.tmp"
    with probe.open("xb") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
    probe.unlink()
    return mode


def verify_folder(folder: Path) -> None:
    """Raise CheckpointError naming every file that is damaged, missing or extra against MANIFEST.json.

    Each file is read once and hashed by what its entry names: sha256, or BLAKE3 (large weights).
    """
    folder = Path(folder)
    path = folder / MANIFEST
    do = "use an older checkpoint, or copy the folder again from its source"
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no {MANIFEST}: it is not complete", where=str(folder), do=do)
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        entries: dict[str, dict[str, Any]] = manifest["files"]
        expected = {str(name): _expected(entry) for name, entry in entries.items()}
        stated = str(manifest["digest"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}", where=str(path), do=do) from error
    problems = []
    actual = sha256_bytes(to_json(entries).encode())
    if actual != stated:
        problems.append(
            Problem(f"{MANIFEST} is damaged: expected sha256 {stated}, actual {actual}", str(path), None, do)
        )
    elif not raw.endswith(b"\n"):
        problems.append(Problem(f"{MANIFEST} is damaged: its end is cut off", str(path), None, do))
    files = _listing(folder)
    for name in sorted(expected.keys() | files.keys()):
        where = str(folder / name)
        if name not in expected:
            problems.append(Problem(f"{name} is not in {MANIFEST}", where, None, "delete it, or " + do))
            continue
        want_size, kind, want = expected[name]
        if name not in files:
            problems.append(Problem(f"{name} is missing: expected {kind} {want}", where, None, do))
            continue
        try:
            size, digest = files[name].stat().st_size, digest_file(files[name], DIGESTS[kind]())
        except OSError as error:  # a bad sector, a network disk that is gone
            problems.append(Problem(f"{name} cannot be read: {error}", where, None, do))
            continue
        if (size, digest) != (want_size, want):
            text = f"{name} is damaged: expected {kind} {want} ({want_size:,} bytes), actual {digest} ({size:,} bytes)"
            problems.append(Problem(text, where, None, do))
    if problems:
        raise CheckpointError(problems)


def _expected(entry: Mapping[str, Any]) -> tuple[int, str, str]:
    """(bytes, kind of digest, digest) of a manifest entry."""
    kinds = [kind for kind in DIGESTS if kind in entry]
    if len(kinds) != 1:
        raise ValueError(f"an entry names {len(kinds)} digests of {', '.join(DIGESTS)}, not one")
    return int(entry["bytes"]), kinds[0], str(entry[kinds[0]])


def remove_stale(folder: Path) -> tuple[Path, ...]:
    """Delete what killed processes left in `folder` (`.NAME.PID.tmp`); a folder caught in a swap is put back.

    Returns the paths that were deleted. Temporaries of running processes stay.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        match = _TEMPORARY.match(path.name)
        if not match or not _is_stale(path, int(match["pid"])):
            continue
        if match["extra"] == ".old" and not (path.parent / match["name"]).exists():
            os.rename(path, path.parent / match["name"])
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return tuple(removed)


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is one that is still being written, or was when its writer was killed."""
    return _TEMPORARY.match(name) is not None


def _is_stale(path: Path, pid: int) -> bool:
    return str(path.absolute()) not in _open_here if pid == os.getpid() else not alive(pid)
