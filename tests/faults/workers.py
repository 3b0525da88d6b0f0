"""F20: a loader worker is killed, raises or never answers; the run ends in time, leaves no process and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from tests.faults.trial import (
    Fault,
    Tally,
    completed,
    digest,
    expect,
    finish,
    orphans,
    recipe,
    run_of,
    same,
    start,
    train,
    wait,
)

HANG = 3.0
"""Seconds without an answer after which a worker counts as hanging, here instead of minutes."""


def at_micro_batch(index: int, act: Callable[[], None]) -> Callable[[], None]:
    """A `prepare`: a worker does `act` when it is to make this micro-batch."""

    def prepare() -> None:
        import mmft.data.loader as loader

        loader.HANG_SECONDS = HANG
        inner, parent = loader._MicroBatches.__getitem__, os.getpid()

        def item(self: Any, at: int) -> Any:
            if at == index and os.getpid() != parent:
                act()
            return inner(self, at)

        loader._MicroBatches.__getitem__ = item  # type: ignore[method-assign]

    return prepare


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise RuntimeError("a decoder gave up")


def _never() -> None:
    while True:
        time.sleep(0.1)


def lost_worker(tally: Tally, count: int) -> None:
    """Each of the three at random micro-batches."""
    values = recipe(tally, {"train.dataloader_num_workers": 2})
    wanted = completed(tally, "whole", values)
    for number in range(count):
        act = (_die, _raise, _never)[number % 3]
        at = tally.draw.randrange(24)
        with tally.trial(f"{act.__name__} at micro-batch {at}"):
            place = tally.place("run")
            begin = time.monotonic()
            pid = start(train(values, place, prepare=at_micro_batch(at, act)), place / "log")
            code = wait(pid, seconds=120)
            tally.measure(time.monotonic() - begin)
            text = (place / "log").read_text()
            expect(code != 0, "the run did not notice")
            expect(act is _raise or (code == 3 and "data worker was lost" in text), f"exit {code}: {text[-500:]}")
            expect(act is not _raise or "a decoder gave up" in text, f"exit {code}: {text[-500:]}")
            expect(time.monotonic() - begin < 60, "it took longer than a minute")
            expect(not orphans(pid), f"processes were left: {orphans(pid)}")
            code = finish(train(values, place, resume=True), place / "log")
            expect(code == 0, f"exit {code} on resuming: {(place / 'log').read_text()[-500:]}")
            same(digest(run_of(place)), wanted)


FAULTS = (Fault("F20", "a data worker is killed, raises, hangs", 60, 3, "s to the end", lost_worker),)
MUTANTS = (("F20", "mmft/data/loader.py", "watch.start()", "pass"),)
