"""Stop signals: the first is kept, the second ends the process, none is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from mmft.engine.guards import StopSignals


class Ended(Exception):
    """In the place of the process's end."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The signals that reach the handler which was there before."""
    found: list[int] = []

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    before = signal.signal(signal.SIGUSR1, lambda number, _: found.append(number))
    yield found
    signal.signal(signal.SIGUSR1, before)


def test_the_second_signal_ends_the_process_with_its_status(told: list[int]) -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        signals.heeded = True
        with pytest.raises(Ended, match=str(128 + signal.SIGUSR1)):
            signal.raise_signal(signal.SIGUSR1)
    assert not told
    signal.raise_signal(signal.SIGUSR1)
    assert told == [signal.SIGUSR1]


def test_a_signal_that_nobody_heeded_goes_to_who_handled_it_before(told: list[int]) -> None:
    with StopSignals():
        signal.raise_signal(signal.SIGUSR1)
        assert not told
    assert told == [signal.SIGUSR1]


def test_an_error_is_not_drowned_by_a_signal(told: list[int]) -> None:
    with pytest.raises(ValueError, match="the error"), StopSignals():
        signal.raise_signal(signal.SIGUSR1)
        raise ValueError("the error")
    assert not told
