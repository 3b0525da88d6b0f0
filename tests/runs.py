"""Whole runs for the end-to-end tests: projects of a tiny model, the command line in this process, real processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from tests.tiny import save_tiny_vlm, tiny_rows

REPOSITORY = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TARGETS = ["language.attention", "language.mlp", "projector", "head"]
NF4 = {"quantization.load_in_4bit": True, "export.merge_onto": "dequantized"}
TRAIN_ONLY = {"data.eval": [], "export.merge": False}
"""What a test of training alone leaves out: about two thirds of a tiny run."""


@functools.cache
def workshop() -> Path:
    """A folder for what several tests of this process share; gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mmft-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def model(kind: str = "llava", seed: int = 0) -> Path:
    """A tiny model folder."""
    return _model(kind, seed)


def rows(n: int = 16, seed: int = 0) -> Path:
    """A data file of `n` rows; each has the tag `type`: warm (red) or cold."""
    return _rows(n, seed)


@functools.cache
def _model(kind: str, seed: int) -> Path:
    return save_tiny_vlm(workshop() / f"model-{kind}-{seed}", kind, seed=seed)


@functools.cache
def _rows(n: int, seed: int) -> Path:
    path = tiny_rows(workshop() / f"rows-{n}-{seed}", n, seed=seed)
    return rewrite(path, lambda row: {**row, "tags": {"type": "warm" if answer_of(row) == "red" else "cold"}})


def answer_of(row: Mapping[str, Any]) -> str:
    """The last turn's text."""
    return row["messages"][-1]["content"]


def rewrite(path: Path, change: Any, *, out: Path | None = None) -> Path:
    """The file's rows through `change`, written over it or to `out`."""
    lines = [json.dumps(change(json.loads(line))) for line in path.read_text().splitlines()]
    target = out or path
    target.write_text("\n".join(lines) + "\n")
    return target


def values(folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe as values: 8 steps of 2 x 2 rows, fp32, dropout on, a checkpoint every 2 steps; `changes` by dots."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(model()), "dtype": "float32"},
        "quantization": {},
        "adapter": {"targets": TARGETS, "lora_rank": 16, "lora_dropout": 0.1},
        "data": {"train": [{"path": str(rows())}], "eval": [{"path": str(rows(8, 1)), "name": "held"}]},
        "train": {
            "output_dir": str(folder / "runs"),
            "per_device_train_batch_size": 2,
            "effective_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "bf16": False,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "evaluate": {
            "metrics": ["exact_match", "token_f1"],
            "group_by": ["type"],
            "max_new_tokens": 6,
            "bootstrap_samples": 100,
            "per_device_eval_batch_size": 8,
        },
        "export": {"verify_rows": 4},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return recipe


def write_recipe(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """`folder/recipe.yaml` of `values`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(folder, changes), sort_keys=False))
    return path


@dataclass(frozen=True)
class Finished:
    """A run that went to its end, shared by tests that only read it."""

    recipe: Path
    run: Path
    report: dict[str, Any]

    def predictions(self) -> list[dict[str, Any]]:
        return read_lines(self.run / "predictions.jsonl")


def finished(kind: str = "plain") -> Finished:
    """`plain`: fp32, 160 steps; `nf4`: the same on a 4-bit base, merged onto its dequantized weights; `full`: with no
    adapter, 8 steps."""
    return _finished(kind)


@functools.cache
def _finished(kind: str) -> Finished:
    import mmft

    # Half the rate of the short runs: at theirs, a last bit decides after a hundred steps what is answered.
    changes: dict[str, Any] = {"train.max_steps": 160, "train.save_steps": 80, "train.learning_rate": 5e-3}
    if kind == "nf4":
        changes |= {**NF4, "quantization.bnb_4bit_compute_dtype": "float32"}
    if kind == "full":
        changes = {"adapter": {"method": "full", "targets": ["projector", "language"]}, "export.dtype": "bfloat16"}
        changes |= {"train.learning_rate": 1e-3, "evaluate.models": ["base", "adapter"]}
    path = write_recipe(workshop() / kind, changes)
    report = mmft.train(path, quiet=True)
    return Finished(path, workshop() / kind / "runs" / "tiny", report)


@functools.cache
def trained_only() -> Finished:
    """The uninterrupted run (training alone, 60 steps) that killed and stopped ones must equal."""
    import mmft

    path = write_recipe(workshop() / "whole", LONG)
    return Finished(path, workshop() / "whole" / "runs" / "tiny", mmft.train(path, quiet=True))


LONG = {**TRAIN_ONLY, "train.max_steps": 60, "train.save_steps": 4}
"""Long enough that a signal meant for its middle does not come too late on a busy machine."""


# ---------------------------------------------------------------- reading results


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; a line that is being written is left out."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder; {} when it is not there."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def adapter_sha(run: Path) -> str:
    """sha256 of a run's adapter weights."""
    return sha256(run / "adapter" / "adapter_model.safetensors")


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and texts."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def cli(*words: object) -> Outcome:
    """`mmft WORDS` by its own entry point, in this process."""
    from mmft.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["mmft", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the checkout on the path."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", **more}


def run_process(*words: object, timeout: float = 900, **more: str) -> Outcome:
    """A real process; killed when it takes longer than `timeout` seconds."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**more),
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Stable:
    """Processes of `mmft` that start in milliseconds: forked from one that has imported everything and run nothing.

    Each child is a process of its own with its own signals, locks and exit status, as one from the shell is.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.stable"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment(),
        )

    def _ask(self, **question: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, *words: object, log: Path, file_limit: int | None = None, module: bool = False) -> int:
        """Start `mmft WORDS` (`module`: as `python -m mmft`), output to `log`; returns its process id."""
        return self._ask(words=[str(word) for word in words], log=str(log), file_limit=file_limit, module=module)

    def wait(self, pid: int) -> int:
        """Exit status of a child, -N when signal N killed it."""
        return self._ask(wait=pid)

    def run(self, *words: object, log: Path, **how: Any) -> Outcome:
        """Start and wait; both texts are in `err`."""
        code = self.wait(self.start(*words, log=log, **how))
        return Outcome(code, "", log.read_text())

    def close(self) -> None:
        """End it; children that still run are not waited for."""
        self._process.kill()
        self._process.wait()


@functools.cache
def stable() -> Stable:
    """This process's stable."""
    made = Stable()
    atexit.register(made.close)
    return made


def wait_for_step(run: Path, step: int, *, seconds: float = 200) -> None:
    """Until the run's metrics speak of `step`."""
    end = time.monotonic() + seconds
    while not any(row["step"] >= step for row in read_lines(run / "metrics.jsonl")):
        if time.monotonic() > end:
            raise TimeoutError(f"{run} did not come to step {step}")
        time.sleep(0.005)
