"""What is seen of an arm of `make bench`: the end of every step, losses, anonymous memory. Needs nothing but Python."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM = 3
"""Steps before the clock starts."""


@dataclass
class Watch:
    """What is seen of an arm: the end of every step, losses, anonymous memory at 20 Hz."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    peak: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.peak = max(self.peak, anonymous())

    def on_start(self, state: Any, total_steps: int) -> None: ...

    def on_step(self, state: Any, metrics: dict[str, float]) -> None:
        """Called by mmft's engine."""
        self.ends.append(time.perf_counter())
        self.losses.append(metrics["loss"])
        self.tokens = state.tokens_consumed

    def on_evaluate(self, state: Any, metrics: dict[str, float]) -> None: ...

    def on_save(self, state: Any, folder: Path) -> None: ...

    def on_end(self, state: Any) -> None: ...

    def figures(self, batch: float) -> dict[str, Any]:
        """The arm's line."""
        self._over.set()
        steps, spent = len(self.ends) - WARM, self.ends[-1] - self.ends[WARM - 1]
        return {
            "samples_per_second": batch * steps / spent,
            "tokens_per_sample": self.tokens / (batch * len(self.ends)),
            "peak": max(self.peak, anonymous()),
            "losses": self.losses,
        }


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))
