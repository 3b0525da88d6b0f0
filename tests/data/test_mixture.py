"""Mixtures of data sets: how often each comes, evenly over its rows, the same for any number of processes."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mmft.data.mixture import Mixture, largest_remainder, mixture_of
from mmft.data.order import StepPlan, epoch_order
from mmft.data.sample import Sample
from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSource


def rows(**sizes):
    return [Sample(id=f"{name}{k}", turns=(), source=name) for name, size in sizes.items() for k in range(size)]


def mixed(samples, *sources, temperature=1.0):
    sets = [DataSource(path=f"{name}.jsonl", **options) for name, options in sources]
    return mixture_of(samples, sets, [name for name, _ in sources], temperature=temperature)


def test_what_a_recipe_asks_for():
    data = rows(a=900, b=100)
    assert mixed(data, ("a", {}), ("b", {})) is None
    assert mixed(data, ("a", {}), ("b", {"repeat": 3})).draws == (900, 300)
    assert mixed(data, ("a", {"repeat": 0.5}), ("b", {})).draws == (450, 100)
    assert mixed(data, ("a", {"weight": 1}), ("b", {"weight": 3})).draws == (250, 750)
    assert mixed(data, ("a", {}), ("b", {}), temperature=2).draws == (750, 250)  # sqrt: 30 to 10
    assert mixed(data, ("a", {}), ("b", {}), temperature=1e9).draws == (500, 500)
    assert largest_remainder([1, 1, 1], 10) == (4, 3, 3)
    with pytest.raises(RecipeError, match="two training sets are called 'a'"):
        mixed(data, ("a", {"weight": 1}), ("a", {"weight": 2}))


def test_every_row_of_a_set_comes_equally_often():
    plan = StepPlan(rows=60, micro_batch=5, micro_per_step=2, seed=3, mixture=Mixture((40, 30), (15, 45)))
    steps = 6 * 8  # eight epochs of six steps: 120 draws of 40 rows, 360 of 30
    seen = Counter(row for step in range(steps) for row, _ in plan.step_rows(step))
    assert {seen[row] for row in range(40)} == {3} and {seen[row] for row in range(40, 70)} == {12}
    first = [row for step in range(6) for row, _ in plan.step_rows(step)]
    assert sum(row < 40 for row in first) == 15 and first != sorted(first)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_mixture_is_the_same_for_any_number_of_processes(world):
    mixture = Mixture((7, 11), (10, 6))
    alone = StepPlan(rows=16, micro_batch=2, micro_per_step=4, seed=5, mixture=mixture)
    plan = StepPlan(rows=16, micro_batch=2, micro_per_step=4, world=world, seed=5, mixture=mixture)
    for step in (0, 3, 17):
        found = [batch for rank in range(world) for batch in plan.micro_batches(step, rank)]
        joined = tuple(row for batch in sorted(found, key=lambda one: one.index) for row in batch.rows)
        assert joined == alone.step_rows(step)


def test_without_a_mixture_the_order_is_the_plain_one():
    plain = StepPlan(rows=18, micro_batch=3, micro_per_step=2, seed=2)
    whole = StepPlan(rows=18, micro_batch=3, micro_per_step=2, seed=2, mixture=Mixture((7, 11), (7, 11)))
    assert [plain.step_rows(step) for step in range(6)] == [whole.step_rows(step) for step in range(6)]
    assert [row for step in range(3) for row, _ in plain.step_rows(step)] == epoch_order(18, seed=2, epoch=0).tolist()
    with pytest.raises(ValueError, match="the mixture draws 18"):
        StepPlan(rows=17, micro_batch=1, micro_per_step=1, mixture=Mixture((7, 11), (7, 11)))


def recipe(tmp_path, *train, **data):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    found = {"name": "x", "model": {"name_or_path": "shipped:nano-vlm"}, "data": {"train": list(train), **data}}
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(found))
    return load_recipe(path)


def test_recipes_of_mixtures(tmp_path):
    held = recipe(tmp_path, {"path": "a.jsonl#1000"}, {"path": "b.jsonl", "num_samples": 3, "repeat": 2})
    assert [(one.path.rsplit("/", 1)[-1], one.num_samples, one.repeat) for one in held.data.train] == [
        ("a.jsonl", 1000, 1.0),
        ("b.jsonl", 3, 2.0),
    ]
    with pytest.raises(RecipeError, match="some sets have a weight and others none"):
        recipe(tmp_path, {"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"})
    with pytest.raises(RecipeError, match="keep one of the three"):
        recipe(tmp_path, {"path": "a.jsonl", "repeat": 2}, {"path": "b.jsonl"}, temperature=2)
    with pytest.raises(RecipeError, match="weight"):
        recipe(tmp_path, {"path": "a.jsonl", "weight": 0}, {"path": "b.jsonl", "weight": 1})
