"""`python -m tests.faults`: every fault at full count, one row each, then the mutants; exit 1 when anything is red."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally


def families() -> tuple[Any, ...]:
    """The modules that hold faults."""
    from tests.faults import (
        drift,
        export,
        hostile_data,
        hostile_files,
        memory,
        numbers,
        ranks,
        saving,
        soak,
        stopping,
        workers,
    )

    return (stopping, saving, numbers, hostile_data, hostile_files, memory, ranks, drift, export, workers, soak)


def all_faults() -> list[Fault]:
    """Every fault, in the order of its number."""
    found = [fault for family in families() for fault in family.FAULTS]
    return sorted(found, key=lambda fault: int(fault.name[1:]))


def try_fault(fault: Fault, count: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run one fault; its row."""
    tally = Tally(folder, random.Random(f"{fault.name}-{seed}"), fault.unit)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        fault.run(tally, count)
    except Exception as error:
        tally.tried += 1
        tally.failures.append(f"the trial itself: {type(error).__name__}: {error}"[:1500])
    worst = "" if tally.worst is None else f"{tally.worst:.3g} {tally.unit}".strip()
    return {
        "fault": fault.name,
        "title": fault.title,
        "tried": tally.tried,
        "survived": tally.survived,
        "worst": "; ".join(filter(None, (worst, *tally.notes))),
        "seconds": round(time.monotonic() - begin, 1),
        "failures": tally.failures,
    }


def warm() -> None:
    """Import what the trials need, and run no tensor operation: children are forked from here."""
    import mmft.cli
    import mmft.export.merge
    import mmft.run  # noqa: F401
    from mmft.quiet import quiet_upstream

    quiet_upstream()


def _runner(faults: list[tuple[Fault, int]], queue: Path, folder: Path, seed: int) -> None:
    """Take faults from the front until none is left: a name is taken by making its file."""
    for fault, count in faults:
        try:
            os.close(os.open(queue / fault.name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        row = try_fault(fault, count, folder / fault.name, seed)
        (queue / f"{fault.name}.json.part").write_text(json.dumps(row))
        os.replace(queue / f"{fault.name}.json.part", queue / f"{fault.name}.json")
        shutil.rmtree(folder / fault.name, ignore_errors=True)


def run_all(faults: list[tuple[Fault, int]], *, jobs: int, seed: int, show: Any) -> list[dict[str, Any]]:
    """Rows of all faults, `jobs` at a time, each runner in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="mmft-faults-"))
    queue = folder / "queue"
    queue.mkdir()
    pids = []
    for _ in range(jobs):
        pid = os.fork()
        if pid == 0:
            try:
                _runner(faults, queue, folder, seed)
            finally:
                os._exit(0)
        pids.append(pid)
    rows: list[dict[str, Any]] = []
    while pids or any(queue.glob("*.json")):
        for path in sorted(queue.glob("*.json")):
            rows.append(json.loads(path.read_text()))
            show(rows)
            path.unlink()
        for pid in list(pids):
            if os.waitpid(pid, os.WNOHANG)[0]:
                pids.remove(pid)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)
    return sorted(rows, key=lambda row: int(row["fault"][1:]))


def line(row: dict[str, Any]) -> str:
    """One row of the summary."""
    mark = "ok " if row["survived"] == row["tried"] and row["tried"] else "RED"
    return (
        f"{mark} {row['fault']:<4} {row['title']:<58} {row['survived']:>6} of {row['tried']:<6} "
        f"{row['seconds']:>7.1f} s  {row['worst']}"
    )


def main() -> int:
    """Parse the words, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", default="", help="F1,F4: only these")
    parser.add_argument("--reduced", action="store_true", help="the counts of `make test`")
    parser.add_argument("--share", type=float, default=1.0, help="this share of the full counts")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--seed", type=int, default=0, help="other random moments")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--no-mutants", action="store_true", help="leave the mutants out")
    given = parser.parse_args()
    chosen = [fault for fault in all_faults() if not given.only or fault.name in given.only.split(",")]
    counts = [
        (fault, fault.reduced if given.reduced else max(fault.reduced, round(fault.full * given.share)))
        for fault in chosen
    ]
    warm()

    def show(rows: list[dict[str, Any]]) -> None:
        row = rows[-1]
        if given.json:
            Path(given.json).write_text(json.dumps({"faults": rows}, indent=1) + "\n")
        sys.stdout.write(line(row) + "\n" + "".join(f"      {text}\n" for text in row["failures"][:5]))
        sys.stdout.flush()

    rows = run_all(sorted(counts, key=lambda pair: -pair[0].full), jobs=given.jobs, seed=given.seed, show=show)
    red = [row for row in rows if row["survived"] != row["tried"] or not row["tried"]]
    if given.json:
        Path(given.json).write_text(json.dumps({"faults": rows}, indent=1) + "\n")
    sys.stdout.write(f"{len(rows) - len(red)} of {len(rows)} faults survived\n")
    missed = 0
    if not given.no_mutants:
        words = [sys.executable, "-m", "tests.mutants", *(["--only", given.only] if given.only else [])]
        missed = subprocess.run(words, check=False).returncode
    return 1 if red or missed else 0


if __name__ == "__main__":
    sys.exit(main())
