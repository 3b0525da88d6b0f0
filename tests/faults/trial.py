"""How a fault is tried: counted trials, processes forked from a warm parent, and the small run that is broken.

The parent imports torch and mmft but runs no tensor operation, so that its children inherit no thread pool; each child
is a process of its own with its own signals, limits and exit status.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 24
SAVE_EVERY = 4
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Tally:
    """Trials of one fault: how many were tried and survived, the worst figure that was measured, what failed."""

    folder: Path
    draw: random.Random
    unit: str = ""
    tried: int = 0
    survived: int = 0
    worst: float | None = None
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def trial(self, what: str, *, weight: int = 1) -> Iterator[None]:
        """Count `weight` trials; an exception inside is a failure and is kept."""
        self.tried += weight
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            line = traceback.extract_tb(error.__traceback__)[-1]
            self.failures.append(f"{what}: {text[:600]} ({Path(line.filename).name}:{line.lineno})")
        else:
            self.survived += weight

    def measure(self, value: float) -> None:
        """Keep the largest value: the row's worst case."""
        self.worst = value if self.worst is None else max(self.worst, value)

    def place(self, name: str) -> Path:
        """A fresh folder of a trial."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True)
class Fault:
    """One row of the table. `run(tally, count)` makes about `count` trials; `full` and `reduced` are its counts."""

    name: str
    title: str
    full: int
    reduced: int
    unit: str
    run: Callable[[Tally, int], None]


def expect(good: bool, text: str) -> None:
    """An assertion that pytest does not rewrite and -O does not drop."""
    if not good:
        raise AssertionError(text)


# ---------------------------------------------------------------- processes


def start(
    work: Callable[[], Any], log: Path, *, environment: Mapping[str, str] | None = None, file_limit: int | None = None
) -> int:
    """Fork a child that does `work` as a command would (exit codes, messages in `log`); returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = _child(work, log, environment or {}, file_limit)
    finally:
        os._exit(code)


def _child(work: Callable[[], Any], log: Path, environment: Mapping[str, str], file_limit: int | None) -> int:
    from mmft.errors import MmftError

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        work()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except MmftError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(pid: int, *, seconds: float = 300.0) -> int:
    """Exit status, -N when signal N ended it; after `seconds` the child is killed and TimeoutError raised."""
    begin, nap = time.monotonic(), 0.001
    before = begin
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if now - before > 5.0:  # this process itself was stopped meanwhile, and the child with it
            begin += now - before
        before = now
        if now - begin > seconds:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} still ran after {seconds:.0f} s")
        time.sleep(nap)
        nap = min(nap * 1.5, 0.02)


def finish(work: Callable[[], Any], log: Path, **how: Any) -> int:
    """Start a child and wait for it."""
    seconds = how.pop("seconds", 300.0)
    return wait(start(work, log, **how), seconds=seconds)


def answer(work: Callable[[], Any], folder: Path, **how: Any) -> Any:
    """The JSON value that `work` returns in a child; RuntimeError with its output when it fails."""
    out, log = folder / f"answer-{time.monotonic_ns()}.json", folder / "answer.log"
    code = finish(lambda: out.write_text(json.dumps(work())), log, **how)
    if code:
        raise RuntimeError(f"exit {code}: {log.read_text()[-1500:]}")
    found = json.loads(out.read_text())
    out.unlink()
    return found


def orphans(pid: int) -> list[int]:
    """Living processes of the group that a child of ours leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z" and int(fields[2]) == pid and int(entry.name) != pid:
                found.append(int(entry.name))
    return found


# ---------------------------------------------------------------- the run that is broken


def shelf(folder: Path) -> Path:
    """A tiny model and 16 rows, made once (in a child) and shared by the trials of a fault."""
    place = folder / "shelf"
    if not place.exists():

        def make() -> None:
            from tests.tiny import save_tiny_vlm, tiny_rows

            save_tiny_vlm(place / "model")
            tiny_rows(place / "rows", 16)

        place.mkdir(parents=True)
        if finish(make, place / "log"):
            raise RuntimeError((place / "log").read_text())
    return place


def recipe(tally: Tally, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """24 steps of training with dropout, a checkpoint every 4, two kept; `changes` by dots."""
    place = shelf(tally.folder)
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(place / "model"), "dtype": "float32"},
        "adapter": {"targets": ["language.attention", "projector"], "lora_rank": 4, "lora_dropout": 0.1},
        "data": {"train": [{"path": str(place / "rows" / "rows.jsonl")}], "max_length": 256},
        "train": {
            "per_device_train_batch_size": 2,
            "effective_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "bf16": False,
            "save_steps": SAVE_EVERY,
            "logging_steps": 1,
        },
        "export": {"merge": False},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return values


def train(values: dict[str, Any], folder: Path, *, resume: bool = False, prepare: Any = None) -> Callable[[], None]:
    """Work for `start`: `mmft train` of the values in `folder`; `prepare()` is called first in the child."""

    def work() -> None:
        import yaml

        from mmft.cli import main

        if prepare is not None:
            prepare()
        path = folder / "recipe.yaml"
        if not path.exists():
            path.write_text(yaml.safe_dump(values, sort_keys=False))
        words = ["train", str(path), f"train.output_dir={folder / 'runs'}", "--quiet"]
        sys.argv = ["mmft", *words, *(["--resume"] if resume else [])]
        main()

    return work


def run_of(folder: Path) -> Path:
    """The run folder of a trial."""
    return folder / "runs" / "tiny"


def at_step(step: int, do: Callable[[], None]) -> Callable[[], None]:
    """A `prepare` that calls `do` right after optimizer step `step` was written to the metrics."""

    def prepare() -> None:
        from mmft.engine.callbacks import MetricsWriter

        inner = MetricsWriter.on_step

        def on_step(self: Any, state: Any, metrics: dict[str, float]) -> None:
            inner(self, state, metrics)
            if state.step == step:
                do()

        MetricsWriter.on_step = on_step  # type: ignore[method-assign]

    return prepare


def digest(run: Path, *, step: int = STEPS) -> dict[str, Any]:
    """What must be equal in the end: weights, optimizer and counters of the last checkpoint, the adapter, and the
    ledger (every step's loss and count)."""
    last = run / "checkpoints" / f"step-{step:06d}"
    found: dict[str, Any] = {
        name: hashlib.sha256((last / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in ("trainable", "optimizer")
    }
    found["adapter"] = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    found["state"] = json.loads((last / "state.json").read_text())["state"]
    found["ledger"] = ledger(run)
    return found


def ledger(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, supervised tokens) of every step, in the order of the file; a torn last line is left out."""
    found = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row:
            found.append((row["step"], row["loss"], row["supervised_tokens"]))
    return found


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """AssertionError naming what differs between two digests."""
    bad = [name for name in wanted if json.dumps(found[name]) != json.dumps(wanted[name])]
    expect(not bad, f"{', '.join(bad)} differ from the uninterrupted run")


def completed(tally: Tally, name: str, values: dict[str, Any], **how: Any) -> dict[str, Any]:
    """The digest of an uninterrupted run of `values`."""
    place = tally.place(name)
    code = finish(train(values, place, **how), place / "log")
    if code:
        raise RuntimeError(f"the uninterrupted run ended with {code}: {(place / 'log').read_text()[-2000:]}")
    return digest(run_of(place))


def newest(run: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 when there is none."""
    from mmft.engine.checkpoint import list_checkpoints
    from mmft.errors import CheckpointError
    from mmft.files import verify_folder

    for folder in list_checkpoints(run / "checkpoints"):
        try:
            verify_folder(folder)
        except CheckpointError:
            continue
        return int(folder.name.removeprefix("step-"))
    return 0
