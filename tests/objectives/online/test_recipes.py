"""The recipes of online RL, small: two steps on real scenes, to the end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import mmft
from mmft.data.scenes import build_scene_set
from tests.runs import REPOSITORY, read_lines, workshop


@pytest.fixture(scope="module")
def scenes() -> Path:
    return build_scene_set("openmoji-sides", workshop() / "sides", rows=24)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_recipe_is_planned_and_runs_small(name, scenes, tmp_path):
    recipe = REPOSITORY / "recipes" / f"{name}.yaml"
    small = [f"data.train.0.path={scenes}", f"data.eval.0.path={scenes}", "data.eval.0.num_samples=8"]
    small += ["train.max_steps=2", "train.eval_steps=1", "objective.num_generations=4", f"train.output_dir={tmp_path}"]
    small += ["train.per_device_train_batch_size=4", "train.effective_batch_size=8", "evaluate.bootstrap_samples=50"]
    plan = mmft.plan(recipe, small)
    assert plan["steps"]["total"] == 2 and plan["tokens"]["image"]["max"] == 36
    report = mmft.train(recipe, small, quiet=True)
    assert set(report["scores"]) == {"base", "adapter", "merged"}
    assert report["online"]["sampler_gap"]["largest_at_start"] < 1e-4
    rows = [row for row in read_lines(tmp_path / name / "metrics.jsonl") if "reward" in row]
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
