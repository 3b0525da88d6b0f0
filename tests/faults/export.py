"""F19: a merge that is killed, broken in its writer, or given the wrong things leaves nothing or a verified folder."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, answer, expect, finish, start, wait


def merges(tally: Tally, count: int) -> None:
    """Kills at random times, errors inside the writer, an adapter with NaN, another base, an unusual umask."""
    place = tally.place("pair")

    def make() -> list[str]:
        from tests.export.big import big_pair

        return [str(path) for path in big_pair(place, megabytes=40)]

    base, adapter = (Path(path) for path in answer(make, tally.folder, seconds=300))
    begin = time.monotonic()
    expect(finish(_merge(base, adapter, place / "whole"), tally.folder / "log") == 0, "the merge itself fails")
    whole = time.monotonic() - begin
    absent = 0
    for number in range(count):
        with tally.trial(f"kill {number}"):
            out = place / f"out{number}"
            pid = start(_merge(base, adapter, out), tally.folder / "log")
            time.sleep(tally.draw.uniform(0.0, 1.1) * whole)
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            absent += not out.exists()
            _absent_or_whole(out, place / "whole")
            shutil.rmtree(out, ignore_errors=True)
    with tally.trial("a merge after the kills"):
        expect(finish(_merge(base, adapter, place / "last"), tally.folder / "log") == 0, "it fails")
        left = [path.name for path in place.glob(".*.tmp")]
        expect(not left, f"left behind: {left}")
        _absent_or_whole(place / "last", place / "whole")
    for name, prepare in (("fsync", _broken_fsync), ("a full disk", _broken_write)):
        with tally.trial(f"an error inside the writer: {name}"):
            code = finish(_merge(base, adapter, place / "broken", prepare), tally.folder / "log")
            expect(code not in (0, 70), f"exit {code}")
            expect(not (place / "broken").exists(), "something was left")
    _wrong_things(tally, place, base, adapter)
    tally.notes.append(f"{absent} of {count} kills left nothing")


def _merge(base: Path, adapter: Path, out: Path, prepare: Callable[[], None] | None = None) -> Callable[[], None]:
    def work() -> None:
        from mmft.export.merge import merge_adapter

        if prepare is not None:
            prepare()
        merge_adapter(base, adapter, out, max_shard_size="10MB")

    return work


def _absent_or_whole(out: Path, whole: Path) -> None:
    from mmft.files import verify_folder

    if out.exists():
        verify_folder(out)
        for path in whole.glob("*.safetensors"):
            expect(path.read_bytes() == (out / path.name).read_bytes(), f"{path.name} differs")


def _broken_fsync() -> None:
    calls = [0]
    inner = os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] >= 2:
            raise OSError(5, "Input/output error")
        inner(handle)

    os.fsync = fsync


def _broken_write() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))


def _wrong_things(tally: Tally, place: Path, base: Path, adapter: Path) -> None:
    bad, other, out = place / "nan", place / "other", place / "wrong"

    def spoil() -> None:
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(adapter, bad)
        tensors = load_file(bad / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[3] = torch.nan
        save_file(tensors, bad / "adapter_model.safetensors")

    expect(finish(spoil, tally.folder / "log") == 0, "no spoilt adapter could be made")
    with tally.trial("an adapter that holds NaN"):
        code = finish(_merge(base, bad, out), tally.folder / "log")
        expect(code in (8, 9) and not out.exists(), f"exit {code}")
    shutil.copytree(base, other)
    with tally.trial("weights of the base are missing"):
        next(iter(sorted(other.glob("*.safetensors")))).unlink()
        code = finish(_merge(other, adapter, out), tally.folder / "log")
        expect(code in (7, 8, 9) and not out.exists(), f"exit {code}")
    with tally.trial("modes follow the umask"):

        def tight() -> None:
            os.umask(0o027)
            _merge(base, adapter, out)()

        expect(finish(tight, tally.folder / "log") == 0, "it fails")
        modes: set[Any] = {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()}
        expect(modes == {0o640}, f"modes {modes}")


FAULTS = (Fault("F19", "a merge killed, broken, or given the wrong things", 50, 6, "", merges),)
MUTANTS = (
    (
        "F19",
        "mmft/files.py",
        "return str(path.absolute()) not in _open_here if pid == os.getpid() else not alive(pid)",
        "return False",
    ),
)
