"""`mmft plan --probe`: the largest real step goes through once, beside what was estimated of it; nothing is trained."""

from __future__ import annotations

import json

import pytest
import torch

import mmft
from mmft.engine.budget import sizes_of
from mmft.errors import RecipeError
from mmft.objectives.online.grpo import GroupObjective
from mmft.summary import plan_text
from tests import runs
from tests.fast.test_store_objectives import ONLINE, PREFERENCES, a_recipe, shop
from tests.objectives import captioners, pairs


def test_a_run_of_conversations_is_probed_on_its_largest_forward(tmp_path):
    recipe = runs.write_recipe(tmp_path, {"train.max_steps": 2, "data.eval": []})
    done = runs.cli("plan", str(recipe), "--probe", "--json")
    values = json.loads(done.out)
    found = values["probe"]
    assert done.code == 0 and len(found["rows"]) == 2
    assert found["estimate"] == sum(found["parts"].values())
    assert found["difference"] == pytest.approx((found["estimate"] - found["measured"]) / found["measured"])
    assert abs(found["difference"]) < 0.1
    assert not (tmp_path / "runs").exists(), "nothing is written"
    text = plan_text(values)
    assert "probe step: " in text and "GB measured on the largest 2 rows; estimate " in text
    assert "probe step" not in plan_text(mmft.plan(recipe))


@pytest.mark.parametrize("objective", [PREFERENCES["dpo"], PREFERENCES["reward"], ONLINE["grpo"], ONLINE["ppo"]])
def test_other_objectives_make_a_step_too(tmp_path, objective):
    recipe = a_recipe(tmp_path, objective).model_dump(mode="json", exclude_unset=True)
    found = mmft.plan(recipe, probe=True)["probe"]
    assert found["parts"]["activations"] > 0 and abs(found["difference"]) < 0.1


def test_a_probe_learns_from_all_sampled_answers(tmp_path, monkeypatch):
    """Of an untrained model all may be worth the same, and a step then learns nothing and takes little."""
    found, learn = [], GroupObjective.learn

    def counted(self, rollout, step):
        found.append(len(rollout.rows.ids))
        return learn(self, rollout, step)

    monkeypatch.setattr(GroupObjective, "learn", counted)
    parts = []
    for k in (2, 4):
        objective = {"name": "grpo", "num_generations": k, "rewards": {"format:.*": 1.0}}
        recipe = a_recipe(tmp_path, objective).model_dump(mode="json", exclude_unset=True)
        parts.append(mmft.plan(recipe, probe=True)["probe"]["parts"])
    assert found == [2 * 2, 2 * 4]
    assert parts[1]["activations"] == pytest.approx(2 * parts[0]["activations"], rel=1e-6)
    assert parts[1]["logits"] == 2 * parts[0]["logits"] > 0


def test_captions_and_pairs_make_a_step_too(tmp_path):
    for values in (captioners.values(tmp_path), pairs.values(tmp_path)):
        found = mmft.plan(values, probe=True)["probe"]
        assert found["measured"] > 0 and (found["estimate"] is None) == ("activations" not in found["parts"])
    found["estimate"] = None
    text = plan_text({**mmft.plan(values), "probe": found})
    assert "no estimate for this kind of run" in text


def test_layers_are_computed_again_where_the_recipe_says_so(tmp_path):
    changes = {**runs.TRAIN_ONLY, "train.gradient_checkpointing": True}
    found = mmft.plan(runs.values(tmp_path, changes), probe=True)["probe"]
    assert found["recomputed"] == 2
    budget = {**runs.TRAIN_ONLY, "train.memory_budget": 64.0}
    assert mmft.plan(runs.values(tmp_path, budget), probe=True)["probe"]["recomputed"] == 0


def test_a_step_that_does_not_fit_and_streamed_rows_say_so(tmp_path, monkeypatch):
    streamed = runs.values(tmp_path, {**runs.TRAIN_ONLY, "data.train": [{"path": str(runs.rows()), "streaming": True}]})
    with pytest.raises(RecipeError, match="largest forward of streamed rows"):
        mmft.plan(streamed, probe=True)

    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("mmft.objectives.sft.SftObjective.loss", full)
    with pytest.raises(RecipeError, match="ran out in the probe step"):
        mmft.plan(runs.values(tmp_path, {**runs.TRAIN_ONLY, "train.fast": False}), probe=True)


def test_answers_behind_one_prompt_are_one_row(tmp_path):
    made = shop(tmp_path, PREFERENCES["dpo"])
    shared = made.batch(made.plain, range(3))
    found = sizes_of(shared, made.adapted.backbone.model.config)
    assert shared.inputs["attention_mask"].dim() == 4 and len(found.rows) == 3
    assert found.supervised == len(set(shared.at.tolist())) < len(shared.at)
    made.plain.renderer.share = False
    alone = sizes_of(made.batch(made.plain, range(3)), made.adapted.backbone.model.config)
    assert len(alone.rows) == 6 and sum(alone.rows) > sum(found.rows)
