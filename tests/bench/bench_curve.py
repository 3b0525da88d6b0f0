"""`make bench-curve`: the losses of every row of `make bench`, plain and with everything on, beside those of float32.

    python -m tests.bench.bench_curve --keep FOLDER --row llava:vqa --row smolvlm:long --exact 5

Each row of the table trains the same rows with the same start in bf16, plain (`train.fast: false`) and with all
optimisations, and some steps of both in float32. Printed: the loss of the first step; how far the two curves are apart
in bf16 (greatest and mean over all steps); how far each of them is from the plain float32 run in the steps that this
has (root of the mean square, which is the noise of bf16: a fast path that has no more of it than the plain one is as
near to the true numbers); how far the two float32 runs are apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.models import save_model, save_rows
from tests.runs import read_lines

ROWS = {
    ("llava", "vqa"): 1,
    ("llava", "four"): 3,
    ("smolvlm", "vqa"): 3,
    ("smolvlm", "long"): 1,
    ("qwen2_vl", "mixed"): 1,
}
"""Passes over the rows of each table of the README."""
BATCH = 4


def losses(given: dict[str, Any], *, fast: bool, float32: bool) -> list[float]:
    """The loss of every step of a run with the recipe of the bench."""
    import mmft
    from tests.bench.arms import recipe_of

    with tempfile.TemporaryDirectory(prefix="mmft-bench-") as name:
        os.environ["MMFT_CACHE"] = f"{name}/cache"  # an empty feature store
        values = recipe_of({**given, "fast": fast}, Path(name)).model_dump(mode="json", exclude_unset=True)
        if float32:
            values["model"]["dtype"], values["train"]["bf16"] = "float32", False
        mmft.train(values, quiet=True)
        rows = read_lines(Path(name) / "bench" / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def apart(one: Sequence[float], two: Sequence[float]) -> list[float]:
    """Differences of the steps that both have."""
    return [abs(a - b) for a, b in zip(one, two, strict=False)]


def noise(one: Sequence[float], exact: Sequence[float]) -> float:
    """Root of the mean squared difference from the float32 losses."""
    return statistics.fmean(d * d for d in apart(one, exact)) ** 0.5


def line(name: str, curves: dict[str, list[float]]) -> str:
    """One row of the table from the curves `plain`, `all`, `plain32`, `all32`."""
    plain, every, exact = (curves[key] for key in ("plain", "all", "plain32"))
    between = apart(plain, every)
    return (
        f"{name:<16}{plain[0]:>9.5f}{every[0]:>9.5f}{exact[0]:>9.5f}{max(between):>10.5f}{statistics.fmean(between):>9.5f}"
        f"{noise(plain, exact):>13.5f}{noise(every, exact):>9.5f}{max(apart(curves['all32'], exact)):>13.1e}"
    )


HEAD = (
    f"{'row':<16}{'plain':>9}{'all':>9}{'float32':>9}{'greatest':>10}{'mean':>9}"
    f"{'plain-f32':>13}{'all-f32':>9}{'f32 apart':>13}"
)


def main() -> None:
    """Train and print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    names = [":".join(row) for row in ROWS]
    parser.add_argument("--row", action="append", choices=names, help="again for more; all by default")
    parser.add_argument("--steps", type=int, default=20, help="steps in bf16")
    parser.add_argument("--exact", type=int, default=5, help="steps in float32")
    parser.add_argument("--keep", help="a folder for models and rows, kept for the next table")
    parser.add_argument("--curves", action="store_true", help="print all losses too")
    given = parser.parse_args()
    sys.stdout.write(f"{HEAD}\n")
    with tempfile.TemporaryDirectory(prefix="mmft-bench-") as name:
        folder = Path(given.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        for row in given.row or names:
            kind, data = row.split(":")
            count = round(BATCH * given.steps / ROWS[kind, data])
            count += -count % 4
            rows = save_rows(folder / f"{kind}-{data}-{count}", kind, data, count)
            told = {"model": str(save_model(folder / kind, kind)), "rows": str(rows), "batch": BATCH}
            told |= {"steps": given.steps, "grouped": data == "four"}
            exact = {**told, "steps": min(given.exact, given.steps)}
            curves = {
                "plain": losses(told, fast=False, float32=False),
                "all": losses(told, fast=True, float32=False),
                "plain32": losses(exact, fast=False, float32=True),
                "all32": losses(exact, fast=True, float32=True),
            }
            sys.stdout.write(f"{line(row, curves)}\n")
            if given.curves:
                told_all = (f"    {key:<8}{' '.join(f'{x:.5f}' for x in one)}\n" for key, one in curves.items())
                sys.stdout.write("".join(told_all))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
