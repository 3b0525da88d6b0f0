"""What a run knows about its own progress; everything else follows from the step number."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class TrainState:
    """Counters that a checkpoint stores. `step` is the number of finished optimizer steps, of which `skipped` made no
    update; micro-batches were made smaller `halvings` times; `bad_rows` of a stream were left out."""

    step: int = 0
    samples_consumed: int = 0
    tokens_consumed: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped: str | None = None
    skipped: int = 0
    halvings: int = 0
    bad_rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for `state.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The state a checkpoint held; an unknown key raises TypeError."""
        return cls(**values)
