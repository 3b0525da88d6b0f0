"""`mmft verify-fast`: equal paths pass with exit code 0, a path that is not is told and has exit code 1."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mmft
from mmft.fast import feature_store, known
from mmft.fast.plan import Setting, Work
from tests.runs import cli, values, write_recipe

CHANGES = {"data.eval": [], "adapter.targets": ["language.attention"], "train.gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


def test_both_paths_of_a_recipe_agree(tmp_path):
    done = cli("verify-fast", write_recipe(tmp_path, CHANGES), "train.bf16=true", "--batches", 2, "--json")
    found = done.json()
    assert done.code == 0 and found["ok"], done.err
    assert set(found["precisions"]) == {"float32", "bfloat16"}
    exact = found["precisions"]["float32"]
    assert exact["plain"]["gradients"] == 0.0 and exact["plain"]["on"] == []
    assert {"head_rows", "feature_store"} <= set(exact["all"]["on"]) and exact["feature_store"]["on"] == [
        "feature_store"
    ]
    assert exact["all"]["gradients"] < 1e-5 and exact["all"]["loss"] < 1e-5
    half = found["precisions"]["bfloat16"]
    assert half["plain"]["gradients"] > 0 and half["all"]["gradients"] <= half["all"]["allowed"]
    text = cli("verify-fast", tmp_path / "recipe.yaml", "--batches", 1).out
    assert "feature_store" in text and "float32, 1 steps" in text and "bfloat16, " not in text


def test_a_path_that_parts_is_told(tmp_path, monkeypatch):
    def wrong(setting: Setting, work: Work) -> Work:
        def more(batch):
            batch.inputs["input_ids"][:, 0] = 10
            return batch

        return replace(work, prepare=more)

    broken = replace(feature_store.CANDIDATE, install=wrong)
    monkeypatch.setattr(known, "CANDIDATES", (broken,))
    done = cli("verify-fast", write_recipe(tmp_path, CHANGES), "--batches", 1)
    assert done.code == 1 and "NOT EQUAL" in done.out


def test_an_objective_with_steps_of_its_own_is_refused(tmp_path):
    from mmft.errors import MmftError

    recipe = values(tmp_path, {**CHANGES, "objective": {"name": "contrastive", "cache_features": False}})
    with pytest.raises(MmftError):
        mmft.verify_fast(recipe)
