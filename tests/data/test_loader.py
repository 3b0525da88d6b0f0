"""Batches per step: equal with and without workers, errors come as themselves, lost workers are named."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from mmft.data.loader import batches
from mmft.data.order import StepPlan
from mmft.data.render import Renderer, TooLongError
from mmft.errors import DataError, MemoryLimitError
from tests.data.small import processor, sample

ROWS = [sample(f"Where is the dog {k}?", "top left", images=k % 3, seed=k, id=f"r{k}") for k in range(11)]


def run(plan: StepPlan, *, workers: int = 0, rank: int = 0, start: int = 0, stop: int = 5, rows=ROWS, **options):
    renderer = Renderer(processor(options.pop("kind", "llava")), **{"max_length": 4096, **options})
    return batches(rows, renderer, plan, start_step=start, stop_step=stop, rank=rank, workers=workers, pad_token_id=0)


def same(a, b) -> bool:
    return (
        a.ids == b.ids
        and torch.equal(a.labels, b.labels)
        and a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        and (a.supervised, a.tokens, a.padding) == (b.supervised, b.tokens, b.padding)
    )


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_workers_change_nothing(kind):
    plan = StepPlan(rows=11, micro_batch=2, micro_per_step=3, seed=4)
    plain, ahead = list(run(plan, kind=kind)), list(run(plan, workers=2, kind=kind))
    assert [len(step) for step in plain] == [len(step) for step in ahead] == [3] * 5
    assert all(same(a, b) for one, two in zip(plain, ahead, strict=True) for a, b in zip(one, two, strict=True))


def test_the_rows_are_those_of_the_plan():
    plan = StepPlan(rows=11, micro_batch=2, micro_per_step=3, seed=4)
    for step, found in enumerate(run(plan, start=0, stop=4)):
        expected = [tuple(f"r{row}" for row, _ in micro.rows) for micro in plan.micro_batches(step, 0)]
        assert [batch.ids for batch in found] == expected


def test_a_late_start_is_the_rest_of_the_run():
    plan = StepPlan(rows=11, micro_batch=2, micro_per_step=2, seed=4)
    whole, late = list(run(plan)), list(run(plan, start=3))
    assert all(same(a, b) for one, two in zip(whole[3:], late, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_work(world):
    alone = StepPlan(rows=11, micro_batch=1, micro_per_step=4, seed=4)
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=4, world=world, seed=4)
    ranks = [list(run(plan, rank=rank)) for rank in range(world)]
    for step, expected in enumerate(run(alone)):
        joined = [ranks[m % world][step][m // world] for m in range(4)]
        assert all(same(a, b) for a, b in zip(joined, expected, strict=True))


def test_a_rank_without_work_has_empty_steps():
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1, world=2)
    assert list(run(plan, rank=1, stop=3)) == [[], [], []]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_is_the_same_error_from_a_worker(workers):
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1)
    with pytest.raises(TooLongError) as caught:
        list(run(plan, workers=workers, max_length=20, stop=11))
    assert "Traceback" not in str(caught.value) and "rows.jsonl:" in str(caught.value)
    assert caught.value.problems[0].allowed == "at most 20 (data.max_length)"
    assert not multiprocessing.active_children()  # also while the error, and with it the loop's frame, is held


class _Killer(Renderer):
    """Kills its own process at one row: what the kernel's out-of-memory killer does."""

    def render(self, sample):
        if sample.id == "r3":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().render(sample)


def test_a_killed_worker_is_named():
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1)
    renderer = _Killer(processor("llava"), max_length=4096)
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"a data worker was lost .*pid.*[0-9]+") as caught:
        list(batches(ROWS, renderer, plan, start_step=0, stop_step=11, rank=0, workers=2, pad_token_id=0))
    assert time.perf_counter() - start < 60
    assert not multiprocessing.active_children()
    assert "dataloader_num_workers" in str(caught.value)


class _Choker(Renderer):
    """Has no memory for one row."""

    def render(self, sample):
        if sample.id == "r3":
            raise MemoryError
        return super().render(sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_does_not_fit_into_memory_is_named(workers):
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1)
    with pytest.raises(MemoryLimitError, match=r"while rows were read\n.*samples r3"):
        renderer = _Choker(processor("llava"), max_length=4096)
        list(batches(ROWS, renderer, plan, start_step=0, stop_step=11, rank=0, workers=workers, pad_token_id=0))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_a_batch_over_is_lost(error, monkeypatch):
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    def broken(_):
        raise error

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_next_data", broken)
    with pytest.raises(DataError, match="a data worker was lost"):
        list(run(StepPlan(rows=11, micro_batch=1, micro_per_step=1), workers=2))
    assert not multiprocessing.active_children()


class _Sleeper(Renderer):
    """Never comes back from one row."""

    def render(self, sample):
        if sample.id == "r3":
            time.sleep(3600)
        return super().render(sample)


def test_a_hanging_worker_is_ended(monkeypatch):
    monkeypatch.setattr("mmft.data.loader.HANG_SECONDS", 3.0)
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1)
    renderer = _Sleeper(processor("llava"), max_length=4096)
    with pytest.raises(DataError, match="without an answer for 3 s"):
        list(batches(ROWS, renderer, plan, start_step=0, stop_step=11, rank=0, workers=2, pad_token_id=0))
    assert not multiprocessing.active_children()


def test_workers_end_with_an_abandoned_iterator():
    plan = StepPlan(rows=11, micro_batch=1, micro_per_step=1)
    stream = run(plan, workers=2, stop=1000)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
