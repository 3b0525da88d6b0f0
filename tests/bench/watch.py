"""What is seen of an arm of `make bench`: the end of every step, losses, anonymous memory. Needs nothing but Python."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
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

    def figures(self, batch: float, epochs: float = 1.0) -> dict[str, Any]:
        """The arm's line. Steps before the clock are given the mean time of the others of their epoch: the first epoch,
        which fills what later ones find, counts as often as it was gone through."""
        self._over.set()
        times = [end - begin for begin, end in pairwise(self.ends)]  # of the second step on
        cuts = [round(number * len(self.ends) / epochs) for number in range(int(epochs) + 1)]
        spent = 0.0
        for begin, end in pairwise(cuts):
            seen = times[max(begin, WARM) - 1 : end - 1] or times[max(begin, 1) - 1 : end - 1]
            spent += statistics.fmean(seen) * (end - begin)
        return {
            "samples_per_second": batch * cuts[-1] / spent,
            "tokens_per_sample": self.tokens / (batch * len(self.ends)),
            "peak": max(self.peak, anonymous()),
            "losses": self.losses,
        }


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))
