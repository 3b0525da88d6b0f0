"""The order of rows: a pure function of seed and step, the same on every world size."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mmft.data.order import StepPlan, epoch_order


@pytest.mark.parametrize("rows", [1, 2, 7, 1000])
def test_epoch_order_is_a_permutation_and_differs_by_seed_and_epoch(rows):
    order = epoch_order(rows, seed=3, epoch=0)
    assert sorted(order.tolist()) == list(range(rows))
    assert np.array_equal(order, epoch_order(rows, seed=3, epoch=0))
    if rows > 10:
        assert not np.array_equal(order, epoch_order(rows, seed=3, epoch=1))
        assert not np.array_equal(order, epoch_order(rows, seed=4, epoch=0))


def test_the_order_is_the_same_in_another_process():
    code = "from mmft.data.order import epoch_order; print(epoch_order(20, seed=5, epoch=2).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(epoch_order(20, seed=5, epoch=2).tolist())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_has_the_same_rows_on_any_world_size(world):
    alone = StepPlan(rows=23, micro_batch=3, micro_per_step=4, seed=9)
    plan = StepPlan(rows=23, micro_batch=3, micro_per_step=4, world=world, seed=9)
    for step in range(12):
        parts = [micro for rank in range(world) for micro in plan.micro_batches(step, rank)]
        parts.sort(key=lambda micro: micro.index)
        assert parts == alone.micro_batches(step, 0)
        assert [micro.index % world for micro in plan.micro_batches(step, world - 1)] == [world - 1] * (4 // world)
        assert sum((micro.rows for micro in parts), ()) == plan.step_rows(step)


def test_steps_walk_through_every_row_once_per_epoch():
    plan = StepPlan(rows=10, micro_batch=2, micro_per_step=2, seed=1)
    stream = [pair for step in range(5) for pair in plan.step_rows(step)]  # 20 positions: two epochs, border in step 2
    assert Counter(stream) == Counter((row, epoch) for epoch in (0, 1) for row in range(10))
    assert {epoch for _, epoch in plan.step_rows(2)} == {0, 1}
    assert [row for row, epoch in stream if epoch == 1] == epoch_order(10, seed=1, epoch=1).tolist()


def test_more_rows_per_step_than_rows():
    plan = StepPlan(rows=3, micro_batch=4, micro_per_step=2, seed=0)
    assert [epoch for _, epoch in plan.step_rows(0)] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 5), (0.1, 1), (0.8, 2), (1.2, 3)])
def test_steps_for(epochs, steps):
    assert StepPlan(rows=10, micro_batch=2, micro_per_step=2).steps_for(epochs) == steps


@pytest.mark.parametrize("field", ["rows", "micro_batch", "micro_per_step", "world"])
def test_a_plan_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=field):
        StepPlan(**{"rows": 4, "micro_batch": 1, "micro_per_step": 1, "world": 1, field: 0})


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank 2"):
        StepPlan(rows=4, micro_batch=1, micro_per_step=2, world=2).micro_batches(0, 2)
