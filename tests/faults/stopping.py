"""F1, F2, F7: stopped, killed or told to stop at any moment, a run resumes to the same bytes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.ranks import two
from tests.faults.trial import (
    SAVE_EVERY,
    STEPS,
    Fault,
    Tally,
    at_step,
    completed,
    digest,
    expect,
    finish,
    ledger,
    newest,
    recipe,
    run_of,
    same,
    start,
    train,
    wait,
)

AUGMENTED = {"crop": 0.3, "horizontal_flip": 0.5, "color": 0.2}


def settings() -> list[tuple[int, dict[str, Any]]]:
    """(processes, changes): workers x accumulation x packing by one process, and one setting by two; pictures are
    cropped, turned and coloured anew in every epoch."""
    found: list[tuple[int, dict[str, Any]]] = []
    for workers, accumulation, packing in itertools.product((0, 2), (1, 3), (False, True)):
        values: dict[str, Any] = {
            "train.dataloader_num_workers": workers,
            "train.effective_batch_size": 2 * accumulation,
        }
        values["train.packing"] = packing
        values["data.augmentation"] = AUGMENTED
        if packing:  # dropout draws by the shape of a batch, so packed rows have none
            values["adapter.lora_dropout"] = 0.0
        found.append((1, values))
    found.append((2, {"train.effective_batch_size": 8, "data.augmentation": AUGMENTED}))
    return found


def _ended(world: int, values: dict[str, Any], place: Path, **how: Any) -> set[int]:
    """Exit codes of a run by so many processes."""
    if world == 1:
        return {finish(train(values, place, **how), place / "log")}
    return {wait(pid) for pid in two(values, place, **how)}


def _told(place: Path) -> str:
    return "".join(path.read_text()[-800:] for path in sorted(place.glob("log*")))


def stop_anywhere(tally: Tally, count: int) -> None:
    """F1: SIGTERM after every step in every setting, by one and by two processes, then `--resume`."""
    kinds = settings()
    pairs = [(step, kind) for step in range(1, STEPS) for kind in range(len(kinds))]
    if count < len(pairs):
        pairs = sorted(tally.draw.sample(pairs, count))
    wanted = {}
    for kind in sorted({kind for _, kind in pairs}):
        world, changes = kinds[kind]
        place = tally.place(f"whole-{kind}")
        expect(_ended(world, recipe(tally, changes), place) == {0}, f"the uninterrupted run: {_told(place)}")
        wanted[kind] = digest(run_of(place))
    for step, kind in pairs:
        world, changes = kinds[kind]
        with tally.trial(f"step {step}, {world} processes, {changes}"):
            values, place = recipe(tally, changes), tally.place("run")
            stop = at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            codes = _ended(world, values, place, prepare=stop)
            expect(codes == {143}, f"exits {codes}: {_told(place)}")
            expect(newest(run_of(place)) == step, f"the newest checkpoint is of step {newest(run_of(place))}")
            codes = _ended(world, values, place, resume=True)
            expect(codes == {0}, f"exits {codes} on resuming: {_told(place)}")
            same(digest(run_of(place)), wanted[kind])
    tally.notes.append(f"{len(pairs)} stops in {len(wanted)} settings")


def slow_disk() -> None:
    """Every fsync takes 10 ms more: the window of a save becomes as long as the steps between."""
    inner = os.fsync

    def fsync(handle: int) -> None:
        time.sleep(0.01)
        inner(handle)

    os.fsync = fsync


def _until_saving(pid: int, run: Path, wait_for: int) -> None:
    """Return while the `wait_for`-th save from now on is being written (or when the process has ended)."""
    seen: set[str] = set()
    while len(seen) < wait_for and Path(f"/proc/{pid}/status").exists():
        if b"\nState:\tZ" in (status := _status(pid)) or not status:
            return
        seen |= {path.name for path in run.glob("checkpoints/.step-*.tmp")}
        time.sleep(0.0005)


def _until_step(pid: int, run: Path, step: int) -> None:
    """Return when the metrics hold this step (or the process has ended)."""
    while len(ledger(run)) < step and b"\nState:\tZ" not in (status := _status(pid)) and status:
        time.sleep(0.002)


def _status(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return b""


def kill_anywhere(tally: Tally, count: int) -> None:
    """F2: SIGKILL at uniform times and inside a save; each chain of up to five kills ends in the same bytes."""
    values = recipe(tally)
    begin = time.monotonic()
    wanted = completed(tally, "whole", values)
    length, number, tally.unit = time.monotonic() - begin, 0, "steps lost"
    aimed_total = -(-count * 3 // 10)
    while tally.tried < count:
        place, kills, number = tally.place("run"), 0, number + 1
        failures: list[str] = []
        ended = False
        while kills < 5 and tally.tried + kills < count and not ended:
            aimed = tally.tried + kills < aimed_total
            landed = _one_kill(tally, values, place, resume=kills > 0 or number < 0, aimed=aimed, length=length)
            if landed is None:
                ended = True
                continue
            kills += 1
            failures += landed
        with tally.trial(f"chain {number} of {kills} kills", weight=kills):
            code = finish(train(values, place, resume=True), place / "log")
            expect(code == 0, f"exit {code} on resuming: {(place / 'log').read_text()[-500:]}")
            same(digest(run_of(place)), wanted)
            expect(not [path for path in run_of(place).rglob("*.tmp")], "temporary folders were left")
            expect(not failures, "; ".join(failures))


def _one_kill(
    tally: Tally, values: dict[str, Any], place: Path, *, resume: bool, aimed: bool, length: float
) -> list[str] | None:
    """Kill one process of the run; what is wrong afterwards, None when the run was over before the kill."""
    run = run_of(place)
    before = newest(run)
    pid = start(train(values, place, resume=resume, prepare=slow_disk if aimed else None), place / "log")
    if aimed:
        _until_saving(pid, run, tally.draw.randint(1, 3))
        time.sleep(tally.draw.uniform(0, 0.08))
    else:
        time.sleep(tally.draw.uniform(0, length))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if wait(pid) != -signal.SIGKILL:
        return None
    after = newest(run)
    lost = max((step for step, _, _ in ledger(run)), default=0) - after
    tally.measure(max(lost, 0))
    wrong = [] if lost <= SAVE_EVERY else [f"{lost} steps were lost"]
    wrong += [f"the newest valid checkpoint went from {before} to {after}"] if after < before else []
    begun = any(run.glob("checkpoints/step-*"))
    return wrong + ([f"no valid checkpoint among {list(run.glob('checkpoints/*'))}"] if begun and not after else [])


def told_to_stop(tally: Tally, count: int) -> None:
    """F7: SIGTERM, SIGINT, SIGUSR1 at random times, during evaluations and saves too; a second signal ends at once."""
    values = recipe(
        tally,
        {
            "data.eval": [{"path": recipe(tally)["data"]["train"][0]["path"], "name": "held"}],
            "train.eval_steps": 3,
            "evaluate": {"models": ["adapter"], "max_new_tokens": 4, "bootstrap_samples": 100},
        },
    )
    begin = time.monotonic()
    wanted = completed(tally, "whole", values)
    length, landed, attempt = time.monotonic() - begin, 0, 0
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    while landed < count and attempt < 3 * count:
        attempt += 1
        number, place = kinds[landed % 3], tally.place("run")
        pid = start(train(values, place, prepare=slow_disk), place / "log")
        if landed // 3 % 2 == 0:  # between two steps, or in an evaluation or save between them
            _until_step(pid, run_of(place), tally.draw.randint(1, STEPS - 2))
            time.sleep(tally.draw.uniform(0, 0.05))
        else:
            time.sleep(tally.draw.uniform(0.1, 0.95) * length)
        sent, begun = time.monotonic(), bool(ledger(run_of(place)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        training = begun and len(ledger(run_of(place))) < STEPS  # still: it came between the first and the last step
        twice = landed % 5 == 4
        if twice:
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        code = wait(pid)
        spent = time.monotonic() - sent
        if code == 0 and not training and (run_of(place) / "report.json").exists():
            continue  # the run was over before the signal
        landed += 1
        with tally.trial(f"{number.name} {'twice ' if twice else ''}in trial {landed}"):
            tally.measure(spent)
            log = (place / "log").read_text()
            events = run_of(place) / "events.jsonl"
            graceful = events.is_file() and "stopped by signal" in events.read_text()
            expect(code in (128 + number, -number), f"exit {code}: {log[-500:]}")
            late = twice and graceful  # the second signal met a process that had nothing left to do but to end
            expect(code > 0 or not training or late, f"{number.name} between steps ended the run without a checkpoint")
            expect("Traceback" not in log, log[-800:])
            if twice:
                expect(spent < 2.0 or graceful, f"{spent:.1f} s after the second signal")
            elif graceful:
                stopped = max(step for step, _, _ in ledger(run_of(place)))
                expect(newest(run_of(place)) == stopped, f"no checkpoint of step {stopped}, where it stopped")
            _goes_on(values, place, wanted)
    for number in kinds[: max(1, count // 20)]:
        with tally.trial(f"{number.name} again, while the stop is noted"):
            place = tally.place("run")
            code = finish(train(values, place, prepare=lambda number=number: _again(number)), place / "log")  # type: ignore[misc]
            expect(code == 128 + number, f"exit {code}: {(place / 'log').read_text()[-500:]}")
            expect(newest(run_of(place)) == 5, f"the newest checkpoint is of step {newest(run_of(place))}")
            _goes_on(values, place, wanted)


def _goes_on(values: dict[str, Any], place: Path, wanted: dict[str, Any]) -> None:
    code = finish(train(values, place, resume=True), place / "log")
    expect(code == 0, f"exit {code} on resuming: {(place / 'log').read_text()[-500:]}")
    same(digest(run_of(place)), wanted)


def _again(number: int) -> None:
    """The signal after step 5, and once more after its checkpoint was written."""
    from mmft import stages

    inner = stages._write_facts

    def noted(*given: Any, **how: Any) -> None:
        os.kill(os.getpid(), number)
        inner(*given, **how)

    stages._write_facts = noted
    at_step(5, lambda: os.kill(os.getpid(), number))()


FAULTS = (
    Fault("F1", "stopped after any step, resumed", 207, 6, "", stop_anywhere),
    Fault("F2", "kill -9 at any moment, 3 of 10 inside a save", 200, 6, "steps lost", kill_anywhere),
    Fault("F7", "SIGTERM, SIGINT, SIGUSR1 at any moment", 60, 5, "s to the end", told_to_stop),
)
MUTANTS = (
    ("F1", "mmft/engine/loop.py", "torch.manual_seed(seed)", "pass"),
    (
        "F2",
        "mmft/engine/checkpoint.py",
        "    root.mkdir(parents=True, exist_ok=True)\n",
        "    root.mkdir(parents=True, exist_ok=True)\n    [shutil.rmtree(one) for one in list_checkpoints(root)]\n",
    ),
    (
        "F7",
        "mmft/engine/loop.py",
        "self.save()\n                state.stopped",
        "state.stopped",
    ),
)
