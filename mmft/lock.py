"""One run per folder: a lock file that tells who holds it, taken over when its process is gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mmft.errors import CheckpointError

LOCK = ".lock"
_held: set[str] = set()  # locks of this process: that its own pid is alive says nothing about them


def alive(pid: int, *, started: int | None = None) -> bool:
    """Whether process `pid` of this host runs (a zombie does not); `started` tells it from a later one of that pid."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    state, birth = _status(pid)
    return state != "Z" and (None in (started, birth) or started == birth)


def _status(pid: int) -> tuple[str, int | None]:
    """Process state and start in clock ticks since boot; `("", None)` where /proc does not tell."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        # The second field is the command's name and may hold blanks and brackets; count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return "", None


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` (process, host) during the block; the lock of a dead process is taken over.

    Raises CheckpointError while another run holds it, or if it cannot be written. A process on another host cannot
    be looked up, so its lock counts as held.
    """
    path = Path(folder) / LOCK
    key = str(path.absolute())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path.parent):
            _refuse_held(path, held_here=key in _held)
            mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _status(os.getpid())[1]}
            temporary = path.with_name(f".lock.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(mine) + "\n")
            os.replace(temporary, path)
    except OSError as error:
        do = "check that the folder may be written to and that its disk is not full"
        raise CheckpointError(f"cannot lock the run folder: {error}", where=str(path), do=do) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Processes that name the same folder, or file (made where absent), go through the block one after another; some
    network disks cannot, and go without."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if path.is_dir() else os.O_CREAT), 0o600)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_held(path: Path, *, held_here: bool) -> None:
    try:
        owner = json.loads(path.read_bytes())
        pid, host, started = int(owner["pid"]), str(owner["host"]), owner.get("started")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return  # absent, or torn by a kill: replacing it is atomic, so a running process never leaves a torn one
    here = host == socket.gethostname()
    dead = here and (pid <= 0 or (not held_here if pid == os.getpid() else not alive(pid, started=started)))
    if not dead:
        raise CheckpointError(
            f"another run is using this folder (process {pid} on {host})",
            where=str(path),
            do="wait for it or stop it; if that process is gone, delete the lock file",
        )
