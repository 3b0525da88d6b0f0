"""The recipes that learn from preferences and rewards, whole, each in a process of its own; one table of what they did.

Every entry of `TASKS` is a recipe, what is read from its report, and what must hold. Memory: the largest resident size
of a DPO run against an SFT run with the same batch.
Run: make bench-rl [SEEDS=0,1,2 ONLY=dpo,kto OUT=FOLDER SHORT=1]. A finished run in OUT is read, not run again. SHORT
takes two steps and a few rows of every set: whether everything runs, not what it learns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SEEDS = [int(one) for one in os.environ.get("SEEDS", "0,1,2").split(",")]
OUT = Path(os.environ.get("OUT", "runs/bench-rl"))
SHORT = bool(os.environ.get("SHORT"))
FEW = 32
"""Rows of a set in a short run."""
Report = dict[str, Any]


def score(report: Report, name: str, model: str, metric: str) -> dict[str, float]:
    """One score with its interval."""
    return report["sets"][name]["scores"][model][metric]


def shown(report: Report, name: str, model: str, metric: str) -> str:
    """The same as text."""
    one = score(report, name, model, metric)
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


@dataclass(frozen=True)
class Task:
    """A recipe; `figures` are the cells of its row, `holds` whether it did what is asked of it."""

    recipe: str
    figures: Callable[[Report], list[str]]
    holds: Callable[[Report], bool]


def _reward(report: Report) -> list[str]:
    names = [name for name in report["sets"]]
    cells = [f"{name}: ranks rightly {shown(report, name, 'adapter', 'preference_accuracy')}" for name in names]
    ece, length = (shown(report, names[0], "adapter", metric) for metric in ("ece", "length_correlation"))
    return [*cells, f"calibration error {ece}", f"length {length}"]


def _pairs(report: Report) -> list[str]:
    first, second = list(report["sets"])[:2]
    win, match = (
        [shown(report, first, model, metric) for model in ("base", "adapter")] for metric in ("win_rate", "exact_match")
    )
    lost = (
        score(report, second, "base", "exact_match")["value"] - score(report, second, "adapter", "exact_match")["value"]
    )
    return [f"win rate {' -> '.join(win)}", f"exact match {' -> '.join(match)}", f"lost on {second} {lost:+.3f}"]


def _wins(report: Report) -> bool:
    first, second = list(report["sets"])[:2]
    lost = (
        score(report, second, "base", "exact_match")["value"] - score(report, second, "adapter", "exact_match")["value"]
    )
    return score(report, first, "adapter", "win_rate")["low"] > 0.5 and lost <= 0.02


def _online(report: Report) -> list[str]:
    name = next(iter(report["sets"]))
    change = report["sets"][name]["paired"]["adapter-base"]
    before, after = (shown(report, name, model, "exact_match") for model in ("base", "adapter"))
    gap = report["online"]["sampler_gap"]["largest_at_start"]
    return [f"exact match {before} -> {after}", f"change {change['difference']:+.3f}", f"sampler gap {gap:.1e}"]


def _gains(minutes: int) -> Callable[[Report], bool]:
    """Exact match up by 0.10 or more, in so many minutes of training."""

    def holds(report: Report) -> bool:
        change = report["sets"][next(iter(report["sets"]))]["paired"]["adapter-base"]
        return change["difference"] >= 0.10 and report["training"]["seconds"] <= 60 * minutes

    return holds


TASKS = (
    Task(
        "reward_model",
        _reward,
        lambda report: score(report, "openmoji", "adapter", "preference_accuracy")["value"] >= 0.8,
    ),
    Task("dpo", _pairs, _wins),
    Task("kto", _pairs, _wins),
    Task("grpo", _online, _gains(15)),
    Task("ppo", _online, _gains(30)),
)


def run(recipe: str, seed: int, *changes: str, name: str | None = None) -> Report:
    """The report of a finished run, made by a fresh process where it is not there."""
    folder = OUT / (name or f"{recipe}-{seed}")
    if not (folder / "report.json").is_file() or not json.loads((folder / "report.json").read_text()).get("complete"):
        words = ["train", str(ROOT / "recipes" / f"{recipe}.yaml"), f"name={folder.name}", f"train.output_dir={OUT}"]
        short = _short(recipe) if SHORT else []
        command = [sys.executable, "-m", "mmft", *words, f"train.seed={seed}", *short, *changes, "--overwrite"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return json.loads((folder / "report.json").read_text())


def _short(recipe: str) -> list[str]:
    written = load_recipe(ROOT / "recipes" / f"{recipe}.yaml").data
    few = {
        f"data.{part}": [{**source.model_dump(exclude_unset=True), "num_samples": FEW} for source in sources]
        for part, sources in (("train", written.train), ("eval", written.eval))
    }
    return ["train.max_steps=2", *(f"{name}={json.dumps(sources)}" for name, sources in few.items())]


def memory() -> list[str]:
    """Peak resident bytes of five steps of DPO and of SFT on the same rows, same batch."""
    small = ["train.max_steps=5", "data.eval=[]", "export.merge=false", "train.save_steps=0"]
    rows = 'data.train=[{"path": "shipped:emoji-preferences/openmoji-train", "num_samples": 200}]'
    talk = 'data.train=[{"path": "shipped:emoji-scenes/openmoji-heldout", "num_samples": 200}]'
    dpo = run("dpo", 0, *small, rows, name="memory-dpo")
    sft = run("dpo", 0, *small, talk, "objective.name=sft", "objective.sft_weight=0", name="memory-sft")
    one, other = (report["training"]["peak_memory"] for report in (dpo, sft))
    return [f"DPO {one / 1e9:.2f} GB", f"SFT {other / 1e9:.2f} GB", f"ratio {one / other:.3f} (at most 1.15)"]


def main() -> int:
    """Print the table; 1 when something does not hold."""
    only = os.environ.get("ONLY", "").split(",") if os.environ.get("ONLY") else None
    bad = 0
    for task in TASKS:
        if only is not None and task.recipe not in only:
            continue
        for seed in SEEDS:
            report = run(task.recipe, seed)
            held = task.holds(report)
            bad += not held
            took = report["training"]["seconds"]
            cells = [task.recipe, f"seed {seed}", *task.figures(report), f"{took:.0f} s", "holds" if held else "FAILS"]
            sys.stdout.write("| " + " | ".join(cells) + " |\n")
            sys.stdout.flush()
    if only is None or "memory" in only:
        sys.stdout.write("| " + " | ".join(["memory", *memory()]) + " |\n")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
