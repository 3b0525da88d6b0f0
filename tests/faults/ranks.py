"""F17: one of two processes is killed or hangs; all end, and the run goes on with two or with one."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, digest, expect, finish, ledger, recipe, run_of, same, start, train, wait

TIMEOUT = 8
"""`train.ddp_timeout` of the trials in which a process hangs."""
KILLED_TIMEOUT = 15
"""The same where one is killed: before the two have met, no closed connection tells the other."""
GONE = 30.0
"""Seconds after a kill in which the other one must be gone: the timeout, and as much for a machine with other work."""
PATIENCE = 30.0
"""Seconds that torch's launcher gives a process between SIGTERM, which a stopped one does not see, and SIGKILL."""
SLACK = 30.0
"""Seconds for a step, two processes' ends and the launcher's, on a machine with other work; 3 s on a quiet one."""


def _world(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def two(
    values: dict[str, Any],
    place: Path,
    *,
    resume: bool = False,
    prepare: Any = None,
    environment: Mapping[str, str] | None = None,
) -> list[int]:
    """Both processes of a run, started; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work = train(values, place, resume=resume, prepare=prepare)
    if not (place / "recipe.yaml").exists():
        (place / "recipe.yaml").write_text(json.dumps(values))
    return [
        start(work, place / f"log{rank}", environment={**_world(rank, port), **(environment or {})}) for rank in (0, 1)
    ]


def _both(values: dict[str, Any], place: Path, *, resume: bool = False) -> None:
    codes = [wait(pid) for pid in two(values, place, resume=resume)]
    expect(codes == [0, 0], f"exits {codes}: {(place / 'log0').read_text()[-800:]}")


def lost_rank(tally: Tally, count: int) -> None:
    """SIGKILL of rank 1 and rank 0 at random times; a rank that hangs, under torch's launcher."""
    values = recipe(tally, {"train.effective_batch_size": 4, "train.ddp_timeout": KILLED_TIMEOUT})
    whole = tally.place("whole")
    begin = time.monotonic()
    _both(values, whole)
    length = time.monotonic() - begin
    wanted = digest(run_of(whole))
    for number in range(max(1, count - 2 if count > 10 else count - 1)):
        rank = number % 2 == 0
        with tally.trial(f"rank {int(rank)} killed"):
            place = tally.place("run")
            pids = two(values, place)
            early = number in (2, 3)  # before the two have met, or as they meet
            time.sleep(tally.draw.uniform(0.0, 0.2) * length if early else tally.draw.uniform(0.3, 1.0) * length)
            killed = time.monotonic()
            os.kill(pids[int(rank)], signal.SIGKILL)
            code = wait(pids[1 - int(rank)], seconds=60)
            wait(pids[int(rank)])
            spent = time.monotonic() - killed
            tally.measure(spent)
            expect(spent <= GONE, f"the other process lived on for {spent:.0f} s")
            if code == 0:
                expect((run_of(place) / "report.json").exists(), "exit 0 of an unfinished run")
            if number % 5 == 4:
                _resumed_by_one(tally, values, place, wanted)
            else:
                _both(values, place, resume=True)
                same(digest(run_of(place)), wanted)
    with tally.trial("rank 1 hangs"):
        _hangs(tally, wanted)
    if count > 10:
        with tally.trial("rank 1 hangs below torch's launcher"):
            _hangs_below_launcher(tally, wanted)


def _resumed_by_one(tally: Tally, values: dict[str, Any], place: Path, wanted: dict[str, Any]) -> None:
    """One process goes on with what two began: the same rows in each step, the losses to 1e-6."""
    code = finish(train(values, place, resume=True), place / "log")
    expect(code == 0, f"exit {code}: {(place / 'log').read_text()[-500:]}")
    for (step, loss, tokens), (other, want, count) in zip(ledger(run_of(place)), wanted["ledger"], strict=True):
        expect((step, tokens) == (other, count), "other rows")
        expect(abs(loss - want) <= 1e-6 * abs(want), f"step {step}: loss {loss} instead of {want}")


def _hangs(tally: Tally, wanted: dict[str, Any]) -> None:
    """SIGSTOP of rank 1: rank 0 ends by the stated timeout."""
    values = recipe(tally, {"train.effective_batch_size": 4, "train.ddp_timeout": TIMEOUT})
    place = tally.place("run")
    pids = two(values, place)
    _first_step(place)
    os.kill(pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    try:
        code = wait(pids[0], seconds=TIMEOUT + 30)
        expect(code != 0, "exit 0")
        tally.measure(time.monotonic() - begin)
    finally:
        os.kill(pids[1], signal.SIGKILL)
        wait(pids[1])
    _both(values, place, resume=True)
    same(digest(run_of(place)), wanted)


def _first_step(place: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and not ledger(run_of(place)):
        time.sleep(0.05)


def _hangs_below_launcher(tally: Tally, wanted: dict[str, Any]) -> None:
    """SIGSTOP of one process; the launcher and the other one must end by the stated timeout and half a minute."""
    values = recipe(tally, {"train.effective_batch_size": 4, "train.ddp_timeout": TIMEOUT})
    place = tally.place("run")
    import yaml

    (place / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mmft", "train"]
    words = [sys.executable, *launch, str(place / "recipe.yaml"), f"train.output_dir={place / 'runs'}", "--quiet"]

    def launcher() -> None:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["PYTHONPATH"] = os.getcwd()
        os.execv(sys.executable, words)

    pid = start(launcher, place / "log")
    _first_step(place)
    stopped = _rank_process(pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    code = wait(pid, seconds=TIMEOUT + 90)
    spent = time.monotonic() - begin
    tally.measure(spent)
    expect(code != 0, "exit 0")
    expect(spent <= TIMEOUT + PATIENCE + SLACK, f"{spent:.0f} s with a timeout of {TIMEOUT} s")
    expect(not Path(f"/proc/{stopped}").exists(), "the hanging process is still there")
    _both(values, place, resume=True)
    same(digest(run_of(place)), wanted)


def _rank_process(launcher: int, rank: int) -> int:
    """The process of this rank below the launcher."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher and f"LOCAL_RANK={rank}".encode() in words:
                return int(entry.name)
    raise RuntimeError(f"no process of rank {rank}")


FAULTS = (Fault("F17", "one of two processes is killed, or hangs", 22, 2, "s until all were gone", lost_rank),)
MUTANTS = (("F17", "mmft/stages.py", "timedelta(seconds=section.ddp_timeout)", "timedelta(hours=6)"),)
