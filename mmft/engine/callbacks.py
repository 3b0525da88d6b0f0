"""Five hooks around the loop; everything that watches a run without changing its numbers is one of these."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from mmft.engine.state import TrainState
from mmft.journal import Journal

PLAIN_SECONDS = 20.0
"""Between two lines of progress where there is no terminal."""


class Callback(Protocol):
    """Hooks are called on every rank, in the order of the list, between steps."""

    def on_start(self, state: TrainState, total_steps: int) -> None:
        """Before the first step of this process."""
        ...

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After each optimizer step; `metrics` has loss, learning_rate, grad_norm, samples_per_second, …"""
        ...

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """After an evaluation of the loss."""
        ...

    def on_save(self, state: TrainState, folder: Path) -> None:
        """After a checkpoint was written and verified."""
        ...

    def on_end(self, state: TrainState) -> None:
        """After the last step, also when training stopped early or failed."""
        ...


class Progress:
    """A bar with step, loss, learning rate, samples/s and time left; plain lines where there is no terminal."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._context: Any = None
        self._bar: Any = None
        self._said = 0.0

    def on_start(self, state: TrainState, total_steps: int) -> None:
        self._total = total_steps
        self._first = state.step
        self._begin = time.monotonic()
        self._context = self.journal.progress(total_steps, "train")
        self._bar = self._context.__enter__()
        if state.step:
            self._bar.update(state.step)

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        spent = time.monotonic() - self._begin
        left = int(spent / max(state.step - self._first, 1) * (self._total - state.step))
        fields = {
            "loss": f"{metrics['loss']:.4f}",
            "lr": f"{metrics['learning_rate']:.2e}",
            "samples/s": f"{metrics['samples_per_second']:.1f}",
            "left": f"{left // 60}:{left % 60:02d}",
        }
        self._bar.update(1, **fields)
        if not self.journal.interactive and spent - self._said >= PLAIN_SECONDS:
            self._said = spent
            words = ", ".join(f"{name} {value}" for name, value in fields.items())
            self.journal.say(f"step {state.step} of {self._total}: {words}")

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.journal.say(f"step {state.step}: eval loss {metrics['eval_loss']:.4f}")

    def on_save(self, state: TrainState, folder: Path) -> None:
        self.journal.event("checkpoint", step=state.step, folder=folder.name)

    def on_end(self, state: TrainState) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


class MetricsWriter:
    """metrics.jsonl every `every` steps and at each evaluation; accelerate's trackers get the same numbers."""

    def __init__(self, journal: Journal, accelerator: Accelerator, *, every: int) -> None:
        self.journal = journal
        self.accelerator = accelerator
        self.every = every
        self._total = 0

    def on_start(self, state: TrainState, total_steps: int) -> None:
        self._total = total_steps

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        if state.step % self.every == 0 or state.step in (1, self._total):
            self._write(state.step, metrics)

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        self._write(state.step, metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        self.journal.metrics(step, **metrics)
        if self.accelerator.trackers:
            self.accelerator.log(metrics, step=step)

    def on_save(self, state: TrainState, folder: Path) -> None:
        """Nothing to write."""

    def on_end(self, state: TrainState) -> None:
        """Trackers are closed by the run, which opened them."""
