"""`make bench`: mmft against transformers' Trainer, TRL, ms-swift and LLaMA-Factory on the same rows, alternating, each
arm a fresh process.

    python -m tests.bench.bench --workload llava --data vqa --rounds 3 --steps 24
    python -m tests.bench.bench --workload smolvlm --data four --epochs 3 --arms hf plain all warm

Arms: `hf` (Trainer + peft: bf16, sdpa, no checkpointing, fused AdamW), `trl` (SFTTrainer, likewise, where installed),
`swift`, `llamafactory` and `llamafactory-packed` (`peers.py`; `--peer swift=PYTHON` names the Python of each; llava
only), `plain` (mmft with `train.fast: false`), `+NAME` (one optimisation added after the other, in the order they are
put in), `all` (everything, an empty feature store) and `warm` (everything, the store filled by an earlier run).
Printed: samples/s and real tokens/s by the wall clock, tokens of a row, peak anonymous memory, the share of the
machine's measured bf16 roof, the ratio to `hf` with its range over the rounds, and the greatest difference of a step's
loss from `hf`, which makes a row valid. Models and rows: `models.py`. Run it alone on the machine; others' work shows
in the ranges.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmft.fast.known import CANDIDATES
from tests.bench import peers
from tests.bench.models import LENGTHS, PIXELS, flops, save_model, save_rows

ROOT = Path(__file__).resolve().parents[2]
CLOSE = 0.05
"""Nats a step's loss may differ by: bf16's noise on a few dozen rows."""
OTHERS = ("trl", *peers.PEERS)
"""Arms of packages that need not be there."""


def gemm_roof() -> float:
    """The best rate of bf16 products at the workloads' own shapes and at 2048 cubed, in operations a second."""
    best = 0.0
    for rows, narrow, wide in ((960, 576, 1536), (960, 1536, 576), (2048, 2048, 2048), (1024, 896, 2432)):
        left, right = torch.randn(rows, narrow).bfloat16(), torch.randn(narrow, wide).bfloat16()
        torch.mm(left, right)
        for _ in range(8):
            begin = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * rows * narrow * wide / (time.perf_counter() - begin))
    return best


def arms_of(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of each arm -> what its process is told."""
    names = [one.name for one in CANDIDATES]
    found: dict[str, dict[str, Any]] = {"hf": {"arm": "hf", "fast": False}}
    if importlib.util.find_spec("trl"):
        found["trl"] = {"arm": "trl", "fast": False}
    found |= peers.installed(given.peer if given.workload == "llava" else [])
    found["plain"] = {"arm": "mmft", "fast": False}
    for number, name in enumerate(names, 1):
        found[f"+{name}"] = {"arm": "mmft", "fast": names[:number]}
    found["all"] = {"arm": "mmft", "fast": True}
    found["warm"] = {"arm": "mmft", "fast": True}
    groups = {"steps": [name for name in found if name.startswith("+")]}
    wanted = [name for word in given.arms for name in groups.get(word, [word])] or list(found)
    unknown = sorted(set(wanted) - set(found) - set(OTHERS))
    if unknown:
        raise SystemExit(f"no arm named {', '.join(unknown)}; there are {', '.join(found)} and the group steps")
    for name in [name for name in given.arms or OTHERS if name in OTHERS and name not in found]:
        other = given.workload != "llava" and name in peers.PEERS
        sys.stdout.write(f"{name}: {'with --workload llava only' if other else 'not installed'}\n")
    if not set(wanted) & set(found):
        raise SystemExit("no arm is left to run")
    return {name: found[name] for name in wanted if name in found}


def run_arm(told: dict[str, Any], cache: Path) -> dict[str, Any]:
    """One process; `cache` is its home for whatever it stores."""
    environment = {**os.environ, "MMFT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.bench.arms", json.dumps(told)]
    if "python" in told:
        cache.mkdir(parents=True, exist_ok=True)
        command = [told["python"], "-m", "tests.bench.peers", json.dumps(peers.prepare(told, cache))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{told}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and the middle 95 % of medians of resamples."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[-51]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of every arm in every round."""
    model = save_model(folder / given.workload, given.workload)
    count = max(given.batch, round(given.batch * given.steps / given.epochs))
    count += -count % 4
    rows = save_rows(folder / f"{given.workload}-{given.data}-{count}", given.workload, given.data, count)
    shared = {"model": str(model), "rows": str(rows), "batch": given.batch, "steps": given.steps}
    shared["grouped"] = given.data == "four"
    arms = arms_of(given)
    warm = folder / "warm"
    if "warm" in arms:
        run_arm({**shared, **arms["warm"], "steps": -(-count // given.batch)}, warm)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for turn in range(given.rounds):
        order = list(arms) if turn % 2 == 0 else list(reversed(arms))
        for name in order:
            cold = folder / "cold"
            told = {**shared, **arms[name]}
            if told["arm"] == "mmft":
                told["epochs"] = given.epochs
            if given.peer_steps and told["arm"] != "mmft":
                told["steps"] = min(given.steps, given.peer_steps)
            figures = run_arm(told, warm if name == "warm" else cold)
            shutil.rmtree(cold, ignore_errors=True)
            found[name].append(figures)
            sys.stderr.write(f"round {turn + 1} {name}: {figures['samples_per_second']:.2f} samples/s\n")
    return found


def towers_of(name: str, given: argparse.Namespace) -> float:
    """Pictures that have to go through the tower for each row of an arm."""
    stored = any(one.name == "feature_store" for one in CANDIDATES)
    if name == "warm" and stored:
        return 0.0
    if name == "all" and stored:
        return (1 / 4 if given.data == "four" else 1.0) / given.epochs
    return 1.0


def table(found: dict[str, list[dict[str, Any]]], given: argparse.Namespace, roof: float) -> list[str]:
    """The lines that are printed."""
    against = "hf" if "hf" in found else next(iter(found))
    theirs, width = found[against], max(len(name) for name in found) + 2
    head = (
        f"{'arm':<{width}}{'samples/s':>10}{'tokens/s':>10}{'a row':>7}{'peak GB':>9}{'of roof':>9}"
        f"{'x ' + against:>8}{'95 %':>14}"
    )
    lines = [head + f"{'loss off':>10}"]
    for name, ours in found.items():
        speed = statistics.median(one["samples_per_second"] for one in ours)
        tokens = ours[0]["tokens_per_sample"]
        supervised = LENGTHS[given.data][1] + 1
        work = flops(
            given.workload,
            tokens=tokens,
            supervised=supervised,
            length=tokens,
            rank=16,
            towers=towers_of(name, given),
        )
        pairs = zip(ours, theirs, strict=True)
        ratio, low, high = interval([one["samples_per_second"] / other["samples_per_second"] for one, other in pairs])
        losses = list(zip(ours[0]["losses"], theirs[0]["losses"], strict=False))
        if ours[0].get("reordered"):  # the same rows in other steps
            losses = [tuple(statistics.fmean(side) for side in zip(*losses, strict=True))]
        off = max(abs(one - other) for one, other in losses)
        peak = max(one["peak"] for one in ours) / 1e9
        valid = "" if off < CLOSE else "  NOT VALID"
        lines.append(
            f"{name:<{width}}{speed:>10.2f}{speed * tokens:>10.0f}{tokens:>7.1f}{peak:>9.3f}"
            f"{speed * work / roof:>8.0%} {ratio:>8.2f}{f'{low:.2f}..{high:.2f}':>14}{off:>10.4f}{valid}"
        )
    return lines


def main() -> None:
    """Alternate the arms for some rounds and print the table."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--workload", choices=tuple(PIXELS), default="llava")
    parser.add_argument("--data", choices=tuple(LENGTHS), default="vqa")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of an arm, warm-up included")
    parser.add_argument("--peer-steps", type=int, help="steps of arms other than mmft, whose speed is that of any step")
    parser.add_argument("--peer", action="append", default=[], help="swift=PYTHON or llamafactory=PYTHON")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the rows in those steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="*", default=[], help="names, or steps for all of +NAME; all by default")
    parser.add_argument("--keep", help="a folder for models and rows, kept for the next table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmft-bench-") as name:
        folder = Path(given.keep or name)
        folder.mkdir(parents=True, exist_ok=True)
        roof, load = gemm_roof(), os.getloadavg()[0]
        found = measure(given, folder)
        shutil.rmtree(folder / "warm", ignore_errors=True)
        roof = max(roof, gemm_roof())
    text = f"{given.workload}, {given.data}, batch {given.batch}, {given.steps} steps, {given.epochs:g} epochs"
    end = f"bf16 roof {roof / 1e12:.2f} TFLOP/s; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    sys.stdout.write("\n".join([text, *table(found, given, roof), f"{given.rounds} rounds; {end}"]) + "\n")


if __name__ == "__main__":
    main()
