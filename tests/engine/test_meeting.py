"""Processes that look for each other: a host that never comes, comes late, or is none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from mmft.engine.meeting import meet
from mmft.errors import MmftError

QUERY = "mmft:?rank=1&world_size=2"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    yield number


def _seconds(url: str, timeout: float) -> float:
    begin = time.monotonic()
    with pytest.raises(MmftError, match="process 1 of 2 did not meet the others in 1 s") as caught:
        next(meet(url, timeout=timedelta(seconds=timeout)))
    assert "MASTER_ADDR" in str(caught.value) and "train.ddp_timeout" in str(caught.value)
    return time.monotonic() - begin


def test_a_host_that_is_not_there_is_waited_for_as_long_as_stated(port: int) -> None:
    assert 0.9 <= _seconds(QUERY, 1.0) < 2.0


def test_ranks_of_the_environment(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert 0.9 <= _seconds("mmft://", 1.0) < 2.0


def test_a_host_that_takes_the_connection_and_says_nothing(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        assert 0.9 <= _seconds(QUERY, 1.0) < 2.0


def test_a_host_that_nobody_comes_to(port: int) -> None:
    with pytest.raises(MmftError, match="process 0 of 2 did not meet the others in 1 s"):
        next(meet("mmft:?rank=0&world_size=2", timeout=timedelta(seconds=1)))


def test_an_error_of_the_environment_stays_itself(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ValueError, match="MASTER_ADDR expected"):
        next(meet(QUERY, timeout=timedelta(seconds=1)))


def test_a_host_that_comes_late_is_met(port: int) -> None:
    made: list[dist.Store] = []

    def host() -> None:
        time.sleep(0.7)
        made.append(dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False))

    late = threading.Thread(target=host)
    late.start()
    store, rank, world = next(meet(QUERY, timeout=timedelta(seconds=20)))
    late.join()
    assert (rank, world) == (1, 2)
    made[0].set("said", "yes")
    assert store.get("said") == b"yes"
