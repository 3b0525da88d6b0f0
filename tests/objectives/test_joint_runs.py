"""Whole runs with joint heads, dual learning and hidden words: train, save, merge, prove, score, resume."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import mmft
from mmft.errors import RecipeError
from mmft.objectives.joint_heads import heads_of
from tests.objectives.joints import templated_dual, tiny_blip, tiny_blip2, tiny_blip_joint, tiny_masked
from tests.objectives.pairs import pair_rows, values
from tests.runs import run_process

HEADS = {"language": ("attention",), "cross_attention": ()}


def recipe(folder: Path, name: str, model: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run of `name` on coloured squares."""
    fixed: dict[str, Any] = {
        "name": name,
        "model.name_or_path": str(model),
        "objective.name": name,
        "evaluate.max_new_tokens": 6,
        "evaluate.per_device_eval_batch_size": 4,
        "train.per_device_train_batch_size": 4,
        "train.effective_batch_size": 8,
        "train.max_steps": 2,
        "train.save_steps": 1,
        "train.eval_steps": 2,
    }
    if name == "mlm":
        del fixed["evaluate.max_new_tokens"]
    return values(folder, fixed | {key.replace("__", "."): value for key, value in changes.items()})


MODELS = {"dual": templated_dual, "blip_joint": tiny_blip_joint, "blip": tiny_blip, "blip2": tiny_blip2}


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_joint_run_end_to_end(kind, tmp_path):
    weights = {} if kind in ("dual", "blip_joint") else {"caption": 0}
    words = "projector.attention" if kind == "blip2" else "language.attention"  # the Q-Former reads
    targets = ["vision.attention", words, "cross_attention"]
    extra: dict[str, Any] = {"adapter__modules_to_save": ["itm_head"]} if kind == "dual" else {}
    report = mmft.train(
        recipe(tmp_path, "joint", MODELS[kind](), objective__joint_weights=weights, adapter__targets=targets, **extra),
        quiet=True,
    )
    run = tmp_path / "runs" / "joint"
    heads = report["merge"]["proof"]["heads"]
    assert heads["checked"] and heads["max_difference"] <= heads["limit"] == 1e-5
    assert set(heads["by_head"]) == {"image", "text", "match"} | (set() if weights else {"caption"})
    scores = report["scores"]
    assert {"image_to_text_r@1", "reranked_text_to_image_r@5"} <= set(scores["adapter"])
    assert ("cider" in scores["adapter"]) == ("self_retrieval_r@1" in scores["adapter"]) == (not weights)
    assert scores["adapter"]["image_to_text_r@1"] == scores["merged"]["image_to_text_r@1"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"contrastive", "matching", "matching_accuracy", "batch_accuracy"} <= set(lines[0])
    assert (run / "report.html").is_file() and (run / "base").is_dir() == (kind == "dual")


@pytest.mark.parametrize("form", ["duality", "cycle"])
def test_a_dual_run_learns_and_resumes_exactly(form, tmp_path):
    targets = ["language", "cross_attention"]
    given = recipe(tmp_path, "dual", templated_dual(), objective__consistency=form, adapter__targets=targets)
    given["objective"]["captions_per_image"] = 1
    report = mmft.train(given, quiet=True)
    run = tmp_path / "runs" / "dual"
    first = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any("dual.logit_scale" in name for name in first)
    assert {"cider", "self_retrieval_r@1", "image_to_text_r@1"} <= set(report["scores"]["adapter"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ({"duality"} if form == "duality" else {"there", "back", "returned"}) <= set(lines[0])

    again = given | {"name": "stopped"}
    mmft.train(again | {"train": again["train"] | {"max_steps": 2}}, ["train.max_steps=2"], quiet=True)
    stopped = tmp_path / "runs" / "stopped"
    for name in ("report.json", "adapter"):
        path = stopped / name
        path.rename(stopped / f"old-{name}")
    last = sorted((stopped / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    mmft.train(again, resume=True, quiet=True)
    resumed = load_file(stopped / "adapter" / "adapter_model.safetensors")
    assert first.keys() == resumed.keys() and all(torch.equal(first[name], resumed[name]) for name in first)


@pytest.mark.parametrize(("name", "consistency"), [("joint", "duality"), ("dual", "cycle")])
def test_two_processes_compute_what_one_does(name, consistency, tmp_path):
    """Negatives, sampled captions, counts and losses by set too; both compose the base, one of them first."""
    changes: dict[str, Any] = {"export.merge": False, "evaluate.models": ["adapter"], "train.save_steps": 0}
    changes["data.train"] = [{"path": str(pair_rows(16, at)), "name": f"set{at}"} for at in range(2)]
    if name == "dual":
        changes["objective.consistency"] = consistency
    given = {key.replace(".", "__"): value for key, value in changes.items()}
    losses = []
    for place in ("one", "two"):
        path = tmp_path / f"{place}.yaml"
        path.write_text(
            yaml.safe_dump(recipe(tmp_path / place, name, templated_dual(), adapter__targets=["language"], **given))
        )
        if place == "one":
            mmft.train(path, quiet=True)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            outcome = run_process(*launch, "-m", "mmft", "train", path, ACCELERATE_USE_CPU="true")
            assert outcome.code == 0, outcome.err[-3000:]
        lines = (tmp_path / place / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line) for line in lines])
    for one, two in zip(*losses, strict=True):
        shared = [key for key in one if key not in ("samples_per_second", "learning_rate")]
        assert "eval_loss" in one or {"loss/set0", "terms/set0", "loss/set1", "terms/set1"} <= set(shared)
        assert {key: two[key] for key in shared} == pytest.approx({key: one[key] for key in shared}, rel=1e-4)


def test_a_merged_joint_model_loads_in_plain_transformers(tmp_path):
    mmft.train(
        recipe(tmp_path, "joint", templated_dual(), adapter__targets=["language", "cross_attention"]), quiet=True
    )
    model = transformers.AutoModel.from_pretrained(tmp_path / "runs" / "joint" / "merged")
    assert heads_of(model).terms == ("contrastive", "matching", "caption")
    again = mmft.evaluate(tmp_path / "runs" / "joint", quiet=True)
    assert again["complete"]


@pytest.mark.parametrize("kind", ["vilt", "bridgetower", "flava"])
def test_a_masked_run_end_to_end(kind, tmp_path):
    given = recipe(tmp_path, "mlm", tiny_masked(kind), adapter__targets=["language", "projector"])
    if kind == "vilt":
        given["adapter"]["targets"] = ["language"]
    if kind == "flava":  # peft asks for its input embeddings, which transformers' class does not tell
        given["adapter"] = {"method": "bitfit", "targets": ["language"]}
    report = mmft.train(given, quiet=True)
    scores = report["scores"]["merged"]
    assert {"masked_accuracy", "perplexity"} == set(scores)
    assert scores["perplexity"]["low"] <= scores["perplexity"]["value"] <= scores["perplexity"]["high"]
    assert report["scores"]["adapter"]["perplexity"]["value"] == pytest.approx(scores["perplexity"]["value"], rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "mlm" / "metrics.jsonl").read_text().splitlines()]
    assert "masked_accuracy" in lines[0]


@pytest.mark.parametrize("name", ["joint", "dual", "mlm"])
def test_plan_and_trace_know_these_runs(name, tmp_path):
    given = recipe(tmp_path, name, tiny_masked("vilt") if name == "mlm" else templated_dual())
    given["adapter"]["targets"] = ["language"]
    plan = mmft.plan(given)
    assert plan["data"]["train"] and plan["parts"] and plan["tokens"]["all"]
    stations = mmft.trace(given)
    assert any(station["what"].startswith("Loss ") for station in stations)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objective.joint_weights": {"matching": 1}}, "dual learning has no matching term"),
        ({"objective.joint_weights": {"contrastive": 0, "caption": 0}}, "every term weighs 0"),
        ({"train.effective_batch_size": 1, "train.per_device_train_batch_size": 1}, "one row in a step"),
        ({"objective.name": "joint", "objective.consistency": "cycle"}, "joint does not read it"),
        ({"objective.joint_weights": {"caption": -1}}, "caption: -1 is out of range"),
        ({"evaluate.group_by": ["kind"]}, "not split by tags"),
    ],
)
def test_what_a_dual_run_cannot_do(changes, text, tmp_path):
    with pytest.raises(RecipeError, match=text):
        mmft.validate(values(tmp_path, {"objective.name": "dual", **changes}))
