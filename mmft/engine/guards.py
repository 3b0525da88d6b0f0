"""Guards around a step: non-finite numbers stop before the update, signals stop after it."""

from __future__ import annotations

import os
import signal
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mmft.errors import MemoryLimitError, NonFiniteError


def not_finite(what: str, ids: Sequence[str], *, folder: str) -> NonFiniteError:
    """The error of a loss or gradient that is NaN or infinite; `ids` are the rows it may have come from."""
    return NonFiniteError(
        what,
        where=f"samples {_shown(ids)}",
        allowed="finite numbers",
        do=f"look at these rows with `mmft preview`, lower train.learning_rate, then go on with --resume ({folder})",
    )


def _shown(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def everywhere(ids: Sequence[str]) -> list[str]:
    """The ids of all ranks, in the order of the ranks; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(ids)
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, list(ids))
    return [name for one in found for name in one]


def is_memory_error(error: BaseException) -> bool:
    """Whether the device or the host had no memory left."""
    text = str(error).lower()
    told = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError | MemoryLimitError) or (isinstance(error, RuntimeError) and told)


@contextmanager
def memory_errors(where: str, ids: Sequence[str]) -> Iterator[None]:
    """Turn an out-of-memory error of the device or the host into a MemoryLimitError that names the samples."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise MemoryLimitError(
            f"out of memory at {where}: {str(error).splitlines()[0] if str(error) else 'the host refused'}",
            where=f"samples {', '.join(ids[:8])}",
            do="halve train.per_device_train_batch_size with train.effective_batch_size fixed, or set "
            "train.gradient_checkpointing: true, then go on with --resume",
        ) from error


class StopSignals:
    """While open, the first SIGTERM, SIGINT or SIGUSR1 asks for a stop after the current step; the second ends now.

    `heeded` is set by who stopped for it. A signal that came too late to be heeded is sent again on leaving: what
    handled it before decides then.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.heeded = False
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.received is not None and not self.heeded and kind is None:
            signal.raise_signal(self.received)


class Interrupted(SystemExit):
    """The run was stopped by a signal after its checkpoint was written; exit status 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message
