"""F3 to F6: a save that breaks at any call, rotten bits, bad newest checkpoints, full disks."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.trial import (
    Fault,
    Tally,
    answer,
    at_step,
    completed,
    digest,
    expect,
    finish,
    newest,
    recipe,
    run_of,
    same,
    train,
)

CALLS = (
    (io, "open"), (os, "open"), (os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"),
    (os, "rmdir"), (os, "chmod"),
)  # fmt: skip


def takes_space(call: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call may fail for want of space."""
    if call in (os.unlink, os.rmdir, os.chmod) or call.__name__ in ("unlink", "rmdir", "chmod"):
        return False
    if call is io.open:
        return len(args) > 1 and args[1][0] in "xwa"
    return call.__module__ != "posix" or call.__name__ != "open" or bool(args[1] & os.O_CREAT)


class Nth:
    """From the n-th call on of any system call of a save (`CALLS`, safetensors' writer): `act`."""

    def __init__(self, at: int, act: Callable[[], None], *, writing: bool = False) -> None:
        self.at, self.act, self.writing, self.calls = at, act, writing, 0

    def __call__(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            if not self.writing or takes_space(inner, args):
                self.calls += 1
                if self.calls >= self.at:
                    self.act()
            return inner(*args, **options)

        return called

    @contextmanager
    def on(self) -> Iterator[None]:
        """While open, the calls are counted."""
        import mmft.engine.checkpoint as checkpoint

        places = [*CALLS, (checkpoint, "save_file")]
        before = [getattr(place, name) for place, name in places]
        for (place, name), inner in zip(places, before, strict=True):
            setattr(place, name, self(inner))
        try:
            yield
        finally:
            for (place, name), inner in zip(places, before, strict=True):
                setattr(place, name, inner)


def save(root: Path, step: int, *, keep: int = 1) -> None:
    """A small checkpoint whose tensors are a function of `step`."""
    import torch

    from mmft.engine.checkpoint import save_checkpoint
    from mmft.engine.state import TrainState

    torch.manual_seed(step)
    params = {name: torch.nn.Parameter(torch.randn(40, 30)) for name in ("a.weight", "b.weight")}
    optimizer = torch.optim.AdamW(params.values(), lr=0.1, fused=True)
    sum((param**2).sum() for param in params.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = TrainState(step=step, samples_consumed=4 * step)
    save_checkpoint(root, trainable=params, optimizer=optimizer, state=state, identity={"recipe": "r"}, keep=keep)


def broken_save(tally: Tally, count: int) -> None:
    """F3: each call of a save raises (and goes on raising, as a dying disk does), or ends the process."""
    reached = 0
    for at in range(1, 200):
        if count < 40 and at > 1 and at % max(1, 80 // count):
            continue
        done = False
        for how in ("raise", "exit"):
            with tally.trial(f"call {at}, {how}"):
                done = _one_broken_save(tally, at, how)
        if done:
            tally.tried, tally.survived = tally.tried - 2, tally.survived - 2  # the save had fewer calls than that
            break
        reached = at
    tally.notes.append(f"{reached} calls of a save, raising and ending the process")


def _one_broken_save(tally: Tally, at: int, how: str) -> bool:
    """Whether the save had fewer than `at` calls."""
    root = tally.place(f"save-{how}")

    def first() -> None:
        save(root, 1)

    expect(finish(first, tally.folder / "log") == 0, "the first save failed")

    def second() -> None:
        def act() -> None:
            if how == "exit":
                os._exit(9)
            raise OSError(errno.EIO, "Input/output error")

        nth = Nth(at, act)
        with nth.on():
            save(root, 2)
        if nth.calls < at:
            os._exit(77)

    code = finish(second, tally.folder / "log")
    if code == 77:
        return True
    expect(code in ((9,) if how == "exit" else (0, 4)), f"exit {code}: {(tally.folder / 'log').read_text()[-600:]}")

    def after() -> dict[str, Any]:
        from mmft.engine.checkpoint import newest_valid
        from mmft.files import remove_stale

        remove_stale(root)
        found = newest_valid(root, warn=lambda _: None)
        left = [path.name for path in root.iterdir() if path.name.startswith(".")]
        save(root, 3)
        again = newest_valid(root, warn=lambda _: None)
        return {"found": found and found.name, "left": left, "again": again and again.name}

    seen = answer(after, tally.folder)
    expect(seen["found"] in ("step-000001", "step-000002"), f"after it the newest valid is {seen['found']}")
    expect(not seen["left"], f"left behind: {seen['left']}")
    expect(seen["again"] == "step-000003", f"the next save left {seen['again']}")
    return False


# ---------------------------------------------------------------- bit rot


def bit_rot(tally: Tally, count: int) -> None:
    """F4: bits flipped, files cut, blocks zeroed, files deleted and swapped: each is found and named."""
    root = tally.place("rot")
    if finish(lambda: [save(root, step, keep=2) for step in (1, 2)], tally.folder / "log"):
        raise RuntimeError((tally.folder / "log").read_text())
    folder = root / "step-000002"
    names = sorted(path.name for path in folder.iterdir())
    kinds = ["flip"] * 500 + ["cut"] * 200 + ["zero"] * 200
    for kind in tally.draw.sample(kinds, min(count, len(kinds))):
        path = folder / tally.draw.choice(names)
        data = path.read_bytes()
        spoilt = _spoil(bytearray(data), kind, tally.draw)
        if spoilt == data:
            continue
        path.write_bytes(spoilt)
        with tally.trial(f"{kind} in {path.name}"):
            _must_be_found(folder, path.name, digests=True)
        path.write_bytes(data)
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        with tally.trial(f"{name} deleted"):
            _must_be_found(folder, name, digests=False)
        other = root / "step-000001" / name
        shutil.copy(other, folder / name)
        if other.read_bytes() != data:
            with tally.trial(f"{name} of another step"):
                _must_be_found(folder, "" if name == "MANIFEST.json" else name, digests=True)
        (folder / name).write_bytes(data)
    _seconds_a_hundred_megabytes(tally)


def _spoil(data: bytearray, kind: str, draw: Any) -> bytes:
    at = draw.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    else:
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    return bytes(data)


def _must_be_found(folder: Path, name: str, *, digests: bool) -> None:
    from mmft.errors import CheckpointError
    from mmft.files import verify_folder

    try:
        verify_folder(folder)
    except CheckpointError as error:
        expect(name in str(error), f"the file is not named: {error}")
        if digests and name != "MANIFEST.json":
            expect("expected sha256" in str(error) and "actual" in str(error), f"no digests: {error}")
        return
    raise AssertionError("not detected")


def _seconds_a_hundred_megabytes(tally: Tally) -> None:
    from mmft.files import verify_folder, write_manifest

    folder = tally.place("large")
    (folder / "a.bin").write_bytes(os.urandom(1 << 20) * 100)
    write_manifest(folder)
    begin = time.process_time()
    verify_folder(folder)
    seconds = time.process_time() - begin
    with tally.trial("100 MB in a second"):
        expect(seconds < 1.0, f"{seconds:.2f} s")
    tally.measure(seconds)


# ---------------------------------------------------------------- bad newest


def newest_bad(tally: Tally, count: int) -> None:
    """F5: the last, the last two, or all checkpoints are bad, each in three ways."""
    values = recipe(tally, {"train.save_total_limit": 3, "train.max_steps": 12})
    whole = tally.place("whole")
    stop = at_step(11, lambda: os._exit(9))
    if finish(train(values, whole, prepare=stop), whole / "log") != 9:
        raise RuntimeError((whole / "log").read_text())
    wanted = _finished(tally, values, whole, resume=True)
    for bad in (1, 2, 3)[: max(1, count // 3)]:
        for how in ("flip", "cut", "gone")[: max(1, min(3, count // 3))]:
            with tally.trial(f"{bad} of 2 bad, {how}"):
                _one_bad(tally, values, whole, bad=bad, how=how, wanted=wanted)


def _finished(tally: Tally, values: dict[str, Any], source: Path, *, resume: bool) -> dict[str, Any]:
    place = tally.place("copy")
    shutil.copytree(source, place, dirs_exist_ok=True)
    code = finish(train(values, place, resume=resume), place / "log")
    if code:
        raise RuntimeError((place / "log").read_text()[-1500:])
    return digest(run_of(place), step=12)


def _one_bad(tally: Tally, values: dict[str, Any], whole: Path, *, bad: int, how: str, wanted: dict[str, Any]) -> None:
    place = tally.place("run")
    shutil.copytree(whole, place, dirs_exist_ok=True)
    found = sorted((run_of(place) / "checkpoints").glob("step-*"), reverse=True)
    for folder in found[:bad]:
        path = folder / "optimizer.safetensors"
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(_spoil(bytearray(path.read_bytes()), how, tally.draw))
    before = {path: path.read_bytes() for path in (run_of(place) / "checkpoints").rglob("*") if path.is_file()}
    (place / "log").unlink()
    code = finish(train(values, place, resume=True), place / "log")
    text = (place / "log").read_text()
    if bad >= len(found):
        expect(code == 4 and "none of" in text, f"exit {code}: {text[-500:]}")
        after = {path: path.read_bytes() for path in (run_of(place) / "checkpoints").rglob("*") if path.is_file()}
        expect(before == after, "something was overwritten")
        return
    expect(code == 0, f"exit {code}: {text[-500:]}")
    words = " ".join((run_of(place) / "events.jsonl").read_text().split())
    expect(all(f"{folder.name} is damaged" in words for folder in found[:bad]), "a bad one is not named")
    same(digest(run_of(place), step=12), wanted)


# ---------------------------------------------------------------- full disks


def disk_full(tally: Tally, count: int) -> None:
    """F6: a small disk that is full before the start and in the middle, a limit on file sizes, ENOSPC at each call."""
    values = recipe(tally)
    wanted = completed(tally, "whole", values)
    for when in ("start", "middle"):
        disk = tally.place("disk")
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True
        ).returncode:
            tally.notes.append("no right to mount a small disk here: left out")
            break
        try:
            with tally.trial(f"16 MB disk, full at the {when}"):
                _small_disk(values, disk, when, wanted)
        finally:
            subprocess.run(["umount", "-l", str(disk)], capture_output=True)
    size = (run_of(tally.folder / "whole") / "adapter" / "adapter_model.safetensors").stat().st_size
    for share in (0.3, 0.9)[: max(1, count // 20)]:
        with tally.trial(f"files of at most {share} of the weights"):
            place = tally.place("run")
            code = finish(train(values, place), place / "log", file_limit=int(share * size))
            text = (place / "log").read_text()
            expect(code == 4 and "the disk is full" in text and "bytes needed" in text, f"exit {code}: {text[-500:]}")
            (place / "log").unlink()
            expect(finish(train(values, place, resume=True), place / "log") == 0, "it does not go on")
            same(digest(run_of(place)), wanted)
    for at in range(1, 200):
        if count < 40 and at % 5 != 1:
            continue
        with tally.trial(f"ENOSPC at call {at}"):
            if _no_space_at(tally, at):
                tally.tried, tally.survived = tally.tried - 1, tally.survived - 1
                break


def _small_disk(values: dict[str, Any], disk: Path, when: str, wanted: dict[str, Any]) -> None:
    stuff = disk / "stuff"

    def fill() -> None:
        with stuff.open("wb") as stream:
            try:
                while True:
                    stream.write(bytes(65536))
                    stream.flush()
            except OSError:
                pass

    if when == "start":
        (disk / "runs").mkdir()
        with stuff.open("wb") as stream:
            free = os.statvfs(disk)
            stream.write(bytes(free.f_bavail * free.f_frsize - 120_000))
        prepare = None
    else:
        prepare = at_step(10, fill)
    code = finish(train(values, disk, prepare=prepare), disk.parent / "disk.log")
    text = (disk.parent / "disk.log").read_text()
    (disk.parent / "disk.log").unlink()
    expect(code == 4, f"exit {code}: {text[-800:]}")
    expect("bytes needed" in text and "bytes free" in text, f"no bytes in the message: {text[-500:]}")
    run = run_of(disk)
    if when == "start":
        expect(not (run / "metrics.jsonl").exists(), "steps were taken on a full disk")
    else:
        expect(newest(run) == 8, f"the newest valid checkpoint is {newest(run)}, not 8")
    stuff.unlink()
    code = finish(train(values, disk, resume=True), disk.parent / "disk.log")
    expect(code == 0, f"exit {code} after space was made: {(disk.parent / 'disk.log').read_text()[-500:]}")
    same(digest(run), wanted)


def _no_space_at(tally: Tally, at: int) -> bool:
    root = tally.place("full")
    expect(finish(lambda: save(root, 1), tally.folder / "log") == 0, "the first save failed")
    before = {path.name: path.read_bytes() for path in (root / "step-000001").iterdir()}

    def second() -> None:
        def act() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        nth = Nth(at, act, writing=True)
        with nth.on():
            save(root, 2, keep=2)
        if nth.calls < at:
            os._exit(77)

    (tally.folder / "log").unlink()
    code = finish(second, tally.folder / "log")
    if code == 77:
        return True
    text = (tally.folder / "log").read_text()
    told = "bytes free" in text or "cannot be read" in text  # the latter where the failing call reads
    expect(code == 4 and told or code == 0, f"exit {code}: {text[-500:]}")
    after = {path.name: path.read_bytes() for path in (root / "step-000001").iterdir()}
    expect(json.dumps(sorted(before)) == json.dumps(sorted(after)) and before == after, "the older one was touched")
    expect(finish(lambda: save(root, 3), tally.folder / "log") == 0, "no save after space was made")
    return False


FAULTS = (
    Fault("F3", "every call of a save raises, or is the last", 40, 8, "", broken_save),
    Fault("F4", "bit rot: flips, cuts, zeroed blocks, lost and swapped files", 900, 120, "s to verify 100 MB", bit_rot),
    Fault("F5", "the newest, the newest two, all checkpoints are bad", 9, 3, "", newest_bad),
    Fault("F6", "disk full: before the start, in the middle, at each call", 40, 8, "", disk_full),
)
MUTANTS = (
    (
        "F3",
        "mmft/files.py",
        "return str(path.absolute()) not in _open_here if pid == os.getpid() else not alive(pid)",
        "return False",
    ),
    ("F4", "mmft/files.py", "if (size, digest) != (want_size, want):", "if size != want_size:"),
    (
        "F5",
        "mmft/engine/checkpoint.py",
        "broken.append(folder.name)\n            continue",
        "broken.append(folder.name)\n            break",
    ),
    ("F6", "mmft/files.py", "return error.errno in _FULL", "return False"),
)
