"""The order of streamed rows: permutations without tables, each row once a pass, exact mixtures, constant memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mmft.data.stream_order import BLOCK, StreamPlan, StreamSet, mixed, scattered


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_scattered_is_a_permutation(count):
    for key in (0, 1, 2**62):
        found = [scattered(at, count, key) for at in range(count)]
        assert sorted(found) == list(range(count))
    assert count < 60 or found != [scattered(at, count, 1) for at in range(count)]


def test_scattered_scatters():
    """Neighbours part: the mean distance of places is a random permutation's (n / 3), and no place is favoured."""
    count = 3000
    found = np.array([scattered(at, count, 7) for at in range(count)])
    assert abs(np.abs(np.diff(found)).mean() / count - 1 / 3) < 0.02
    firsts = np.array([scattered(0, 100, key) for key in range(20_000)])
    counts = np.bincount(firsts, minlength=100)
    assert ((counts - 200) ** 2 / 200).sum() < 160  # chi squared with 99 degrees of freedom: p = 1e-4 is at 162


SIZES = [(1,), (5,), (64, 64), (130, 0, 7, 1), tuple(range(40)), (3 * BLOCK + 17, 9)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("together", [0, 1, 4])
def test_every_row_comes_once_a_pass(sizes, together):
    part = StreamSet(sizes, together)
    passes = [[part.at(turn * part.rows + at, seed=3, number=0) for at in range(part.rows)] for turn in range(2)]
    assert all(sorted(one) == list(range(part.rows)) for one in passes)
    assert part.rows < 10 or passes[0] != passes[1]
    again = StreamSet(sizes, together)
    assert [again.at(at, seed=3, number=0) for at in range(min(part.rows, 50))] == passes[0][:50]
    other = [again.at(at, seed=4, number=0) for at in range(part.rows)]
    assert part.rows < 10 or other != passes[0]


def test_only_files_of_one_group_are_open_at_a_time():
    part = StreamSet((100,) * 20, 4)
    files = [part.at(at, seed=0, number=0) // 100 for at in range(2000)]
    groups = [set(files[at : at + 400]) for at in range(0, 2000, 400)]
    assert all(len(group) == 4 for group in groups) and set().union(*groups) == set(range(20))


def test_a_mixture_takes_exactly_what_is_asked_and_evenly():
    draws = (70, 0, 20, 10)
    places = [mixed(at, draws) for at in range(100)]
    for number, count in enumerate(draws):
        assert [before for one, before in places if one == number] == list(range(count))
    for end in range(1, 101):
        seen = sum(one == 0 for one, _ in places[:end])
        assert abs(seen - end * 0.7) < 1


def test_a_plan_draws_each_set_as_often_as_asked():
    sets = (StreamSet((300, 200)), StreamSet((40,)), StreamSet((1000,), 4))
    plan = StreamPlan(1500, 5, 2, 1, 9, sets=sets, draws=(500, 100, 900))
    for epoch in range(3):
        rows = [plan.at(epoch * 1500 + at) for at in range(1500)]
        assert {turn for _, turn in rows} == {epoch}
        counts = np.bincount([row for row, _ in rows], minlength=1540)
        assert (counts[:500] == 1).all() and counts[500:540].sum() == 100 and counts[540:].sum() == 900
        assert set(counts[500:540]) == {2, 3} and counts[540:].max() <= 2
    first = [sum(500 <= plan.at(at)[0] < 540 for at in range(start, start + 300)) for start in range(0, 1500, 300)]
    assert max(first) - min(first) < 25  # the small set comes throughout the epoch


def test_ranks_and_halves_see_the_rows_of_the_step():
    sets = (StreamSet((300, 200)), StreamSet((40,)))
    plans = [StreamPlan(540, 4, 4, world, 1, sets=sets, draws=(500, 40)) for world in (1, 2, 4)]
    for step in (0, 7, 40):
        whole = plans[0].step_rows(step)
        for plan in plans:
            micros = [one for rank in range(plan.world) for one in plan.micro_batches(step, rank)]
            rows = [row for one in sorted(micros, key=lambda one: one.index) for row in one.rows]
            assert tuple(rows) == whole
        assert plans[0].halved().step_rows(step) == whole


def test_a_billion_rows_take_no_more_memory_than_a_thousand():
    def peak(rows: int, files: int) -> int:
        plan = StreamPlan(rows, 8, 1, 1, 0, sets=(StreamSet((rows // files,) * files),), draws=(rows,))
        plan.at(0)
        tracemalloc.start()
        found = {plan.at(at)[0] for at in range(rows - 5000, rows, 7)} | {
            plan.at(at * rows // 50)[0] for at in range(50)
        }
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) > 500 and max(found) < rows
        return size

    assert peak(10**12, 100) < peak(10**5, 100) + 400_000
