"""Guards around a step: non-finite numbers stop before the update, signals stop after it."""

from __future__ import annotations

import math
import os
import signal
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mmft.errors import MemoryLimitError, NonFiniteError


def check_finite(*, step: int, loss: float, norm: float, ids: Sequence[str], folder: str) -> None:
    """Raise NonFiniteError, naming the step's samples, unless loss and gradient norm are finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss {loss} and gradient norm {norm} at step {step}; the weights are those of the step before"
    shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
    raise NonFiniteError(
        what,
        where=f"samples {shown}",
        allowed="finite numbers",
        do=f"look at these rows with `mmft preview`, lower train.learning_rate, then go on with --resume ({folder})",
    )


@contextmanager
def memory_errors(step: int, ids: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the host into a MemoryLimitError that names the samples."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise MemoryLimitError(
            f"out of memory at step {step}: {str(error).splitlines()[0] if str(error) else 'the host refused'}",
            where=f"samples {', '.join(ids[:8])}",
            do="halve train.per_device_train_batch_size with train.effective_batch_size fixed, or set "
            "train.gradient_checkpointing: true, then go on with --resume",
        ) from error


class StopSignals:
    """While open, the first SIGTERM, SIGINT or SIGUSR1 asks for a stop after the current step; the second ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:
            # Only the main thread may set handlers; elsewhere the caller's own handling stays in force.
            self._before.clear()
        return self

    def _handle(self, number: int, _: types.FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class Interrupted(SystemExit):
    """The run was stopped by a signal after its checkpoint was written; exit status 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message
