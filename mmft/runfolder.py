"""A run folder: the recipe it follows, its journal, checkpoints, results. Later commands need nothing else."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mmft.errors import CheckpointError, RecipeError
from mmft.files import is_temporary, remove_stale, run_lock, write_json, write_text
from mmft.journal import Journal
from mmft.lock import LOCK
from mmft.recipe.load import dump_recipe, load_recipe, recipe_drift
from mmft.recipe.schema import Recipe

PACKAGES = ("mmft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder."""

    path: Path
    recipe: Recipe
    journal: Journal

    @property
    def adapter(self) -> Path:
        """The trained adapter (peft layout)."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, where the method is `full`."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        """The merged model."""
        return self.path / "merged"

    @property
    def merge_report(self) -> Path:
        """What the merge did and what its proof found."""
        return self.path / "merge_report.json"

    @property
    def predictions(self) -> Path:
        """Answers of all models to the evaluation rows."""
        return self.path / "predictions.jsonl"

    @property
    def report(self) -> Path:
        """Scores as JSON; the page stands beside it."""
        return self.path / "report.json"

    @property
    def facts(self) -> Path:
        """What training measured: time, speed, memory, parts."""
        return self.path / "training.json"


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run folder, {} when it is not there yet."""
    return json.loads(path.read_text()) if path.is_file() else {}


@contextmanager
def open_run(
    recipe: Recipe, *, resume: bool, overwrite: bool = False, rank: int = 0, quiet: bool = False
) -> Iterator[RunFolder]:
    """The run's folder, locked for this process (on rank 0).

    Raises CheckpointError when the folder exists and neither `resume` nor `overwrite` says what to do with it, and
    RecipeError when a resumed recipe differs in a field that changes numbers.
    """
    path = Path(recipe.train.output_dir) / recipe.name
    if rank != 0:
        yield RunFolder(path, recipe, Journal(None, rank=rank, quiet=True))
        return
    stored = path / "recipe.yaml"
    # A run that was killed before it had written its recipe has left its lock, and what it was writing.
    if path.exists() and any(one.name != LOCK and not is_temporary(one.name) for one in path.iterdir()):
        _may_use(path, stored, recipe, resume=resume, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    with run_lock(path):
        if overwrite and not resume:
            _empty(path)
        remove_stale(path)
        remove_stale(path / "checkpoints")
        write_text(stored, dump_recipe(recipe))
        journal = Journal(path, rank=rank, quiet=quiet)
        write_json(path / "run.json", {"versions": versions(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]})
        journal.event("open", resume=resume, versions=versions())
        yield RunFolder(path, recipe, journal)


def _may_use(path: Path, stored: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    if not stored.is_file():
        raise CheckpointError(
            f"{path} exists and is not a run folder",
            where="train.output_dir",
            allowed="a new folder, or one that mmft made",
            do="choose another `name` or `train.output_dir`",
        )
    if overwrite or not _has_begun(path):
        return
    if not resume:
        raise CheckpointError(
            f"{path} already holds a run; nothing was overwritten",
            where="train.output_dir and name",
            do="go on with --resume, start afresh with --overwrite, or give name=ANOTHER",
        )
    drift = recipe_drift(load_recipe(stored).model_dump(mode="json"), recipe)
    if drift:
        rows = "; ".join(f"{field}: {old} → {new}" for field, old, new in drift[:6])
        raise RecipeError(
            f"the recipe differs from the one the run was started with ({rows})",
            where=str(stored),
            allowed="the same values for every field that changes numbers",
            do="undo the change, or start a new run with name=ANOTHER",
        )


def _has_begun(path: Path) -> bool:
    """Whether anything was trained here; a run that failed on its data before the first step left only notes."""
    return any((path / name).exists() for name in ("metrics.jsonl", "checkpoints", "adapter", "model", "report.json"))


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def find_run(path: str | Path, *, quiet: bool = False) -> RunFolder:
    """A finished or unfinished run, for commands that only read it. Raises CheckpointError when it is not one."""
    folder = Path(path)
    stored = folder / "recipe.yaml"
    if not stored.is_file():
        raise CheckpointError(
            f"{folder} is not a run folder",
            where="argument RUN",
            allowed="a folder that `mmft train` made (it holds recipe.yaml)",
            do="give the path that `mmft train` printed",
        )
    return RunFolder(folder, load_recipe(stored), Journal(None, quiet=quiet))
