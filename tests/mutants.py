"""`python -m tests.mutants`: one-line breaks of mmft, each of which must make its fault's reduced trials fail.

A fault whose trials no mutant fails proves nothing. A mutant is a text that is replaced in a copy of the package; the
trials run in a process of their own that imports the copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fast import breaks
from tests.faults.trial import REPOSITORY

Mutant = tuple[str, str, str, str]
"""Fault, file, the text there, what takes its place."""


def all_mutants() -> list[Mutant]:
    """Every family's mutants, in the order of their faults."""
    from tests.faults.__main__ import families

    found = [mutant for family in families() for mutant in getattr(family, "MUTANTS", ())]
    return sorted(found, key=lambda mutant: int(mutant[0][1:]))


def broken(mutant: Mutant, folder: Path) -> None:
    """A copy of the package in `folder` with the mutant in it. Raises ValueError when its text is not there once."""
    _, file, old, new = mutant
    shutil.copytree(REPOSITORY / "mmft", folder / "mmft", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").symlink_to(REPOSITORY / "tests")
    text = (folder / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} holds {text.count(old)} times: {old}")
    (folder / file).write_text(text.replace(old, new))


def caught(mutant: Mutant, *, seconds: float = 900.0) -> tuple[bool, str]:
    """Whether the fault's reduced trials fail with the mutant, and the first failure."""
    folder = Path(tempfile.mkdtemp(prefix="mmft-mutant-"))
    try:
        broken(mutant, folder)
        words = [sys.executable, "-m", "tests.faults", "--reduced", "--no-mutants", "--only", mutant[0]]
        words += ["--json", str(folder / "rows.json")]
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                env={**_environment(), "PYTHONPATH": str(folder)},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return True, f"did not end in {seconds:.0f} s"
        if not (folder / "rows.json").is_file():
            return False, f"the trials did not run: {done.stderr[-300:]}"
        row = json.loads((folder / "rows.json").read_text())["faults"][0]
        return bool(row["failures"]), (row["failures"] or ["all trials survived"])[0][:200]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def main() -> int:
    """One row per mutant; exit 1 when one is not caught or a fault has none."""
    from tests.faults.__main__ import all_faults

    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--only", default="", help="F1,F4: only these; fast or fast:packing,norms_fused: tests/fast/breaks.py"
    )
    parser.add_argument("--json", help="write the rows to this file")
    given = parser.parse_args()
    if given.only.partition(":")[0] == "fast":
        return breaks.main(given.only.partition(":")[2], given.json)
    chosen = [one for one in all_mutants() if not given.only or one[0] in given.only.split(",")]
    rows: list[dict[str, Any]] = []
    for mutant in chosen:
        begin = time.monotonic()
        good, text = caught(mutant)
        rows.append({"fault": mutant[0], "file": mutant[1], "line": mutant[3].strip(), "caught": good, "by": text})
        sys.stdout.write(
            f"{'caught    ' if good else 'NOT CAUGHT'} {mutant[0]:<4} {mutant[1]:<28} {mutant[3].strip()[:70]:<70} "
            f"{time.monotonic() - begin:5.0f} s\n" + ("" if good else f"      {text}\n")
        )
        sys.stdout.flush()
    without = sorted({fault.name for fault in all_faults()} - {mutant[0] for mutant in all_mutants()})
    missed = [row for row in rows if not row["caught"]]
    sys.stdout.write(f"{len(rows) - len(missed)} of {len(rows)} mutants caught\n")
    if without:
        sys.stdout.write(f"faults without a mutant: {', '.join(without)}\n")
    if given.json:
        Path(given.json).write_text(json.dumps({"mutants": rows}, indent=1) + "\n")
    return 1 if missed or (without and not given.only) else 0


if __name__ == "__main__":
    sys.exit(main())
