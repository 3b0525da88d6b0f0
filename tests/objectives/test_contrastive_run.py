"""Whole contrastive runs on tiny dual encoders: pairs in, adapter, merge, proof and retrieval out."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import mmft
from mmft.errors import BackboneError, DataError, RecipeError
from mmft.planning import make_plan
from mmft.recipe.load import load_recipe
from tests.objectives.pairs import pair_rows, tiny_dual, values
from tests.runs import adapter_sha, read_lines, run_process, workshop
from tests.tiny import tiny_rows

NO_MERGE = {"data.eval": [], "export.merge": False}
SCALE = "base_model.model.logit_scale"


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


@functools.cache
def _finished(kind: str) -> tuple[Path, dict]:
    folder = workshop() / f"contrastive-{kind}"
    changes: dict = {"train.max_steps": 40, "train.save_steps": 0}
    if kind == "siglip":
        changes["objective.loss"] = "sigmoid"
    report = mmft.train(values(folder, changes, kind=kind), quiet=True)
    return folder / "runs" / "pairs", report


@pytest.mark.parametrize("kind", ["dual", "siglip"])
def test_a_run_learns_merges_and_is_scored(kind):
    run, report = _finished(kind)
    losses = _losses(run)
    assert losses[-1] < 0.8 * losses[0]
    found = report["sets"]["held"]
    assert found["rows"] == 8 and report["headline"] == "image_to_text_r@1"
    for way in ("image_to_text", "text_to_image"):
        scores = {model: found["scores"][model][f"{way}_map"]["value"] for model in ("base", "adapter", "merged")}
        assert scores["adapter"] > scores["base"] + 0.2
        assert scores["merged"] == pytest.approx(scores["adapter"], abs=1e-9)
        assert found["ranks"]["adapter"][f"{way}_median_rank"]["value"] == 1.0
    assert found["paired"]["adapter-base"]["metrics"]["text_to_image_map"]["difference"] > 0.2
    proof = report["merge"]["proof"]["embeddings"]
    assert proof["rows"] == 4 and proof["max_difference"] <= proof["limit"] == 1e-5 and proof["checked"]
    assert json.loads((run / "report.json").read_text())["complete"]
    assert "image to text r@1" in (run / "report.html").read_text()


@pytest.mark.parametrize("kind", ["dual", "siglip"])
def test_scale_and_bias_are_trained_and_merged(kind):
    """Under the base's own names in the adapter's file: plain peft and plain transformers load them."""
    run, _ = _finished(kind)
    base = load_file(tiny_dual(kind) / "model.safetensors")
    kept = load_file(run / "adapter" / "adapter_model.safetensors")
    merged = load_file(run / "merged" / "model.safetensors")
    names = ["logit_scale", "logit_bias"] if kind == "siglip" else ["logit_scale"]
    cls = transformers.AutoModel if kind == "siglip" else transformers.VisionTextDualEncoderModel
    plain = PeftModel.from_pretrained(cls.from_pretrained(tiny_dual(kind)), run / "adapter")
    for name in names:
        assert not torch.equal(base[name], kept[f"base_model.model.{name}"])
        assert torch.equal(merged[name], kept[f"base_model.model.{name}"])
        assert torch.equal(dict(plain.named_parameters())[f"base_model.model.{name}"], merged[name])


def test_a_run_is_evaluated_again_from_its_folder():
    run, report = _finished("dual")
    again = mmft.evaluate(run, quiet=True)
    assert again["sets"]["held"]["scores"] == report["sets"]["held"]["scores"]


def test_steps_do_not_depend_on_the_micro_batch(tmp_path):
    """Two passes over four micro-batches against one batch; 1e-5 is the rounding of sums in another order."""
    runs = []
    for size in (4, 16):
        changes = {**NO_MERGE, "train.per_device_train_batch_size": size, "adapter.lora_dropout": 0.0}
        mmft.train(values(tmp_path / str(size), changes), quiet=True)
        runs.append(tmp_path / str(size) / "runs" / "pairs")
    assert _losses(runs[0]) == pytest.approx(_losses(runs[1]), rel=1e-5)
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert SCALE in one
    # AdamW's first steps are signs of gradients, so a gradient that is nothing but rounding moves a weight either way.
    differing = torch.cat([(one[name] - other[name]).abs().flatten() for name in one])
    assert float((differing < 1e-4).float().mean()) > 0.999


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path):
    import shutil

    recipe = values(tmp_path, {**NO_MERGE, "objective.captions_per_image": 1})
    run = tmp_path / "runs" / "pairs"
    mmft.train(recipe, quiet=True)
    wanted = adapter_sha(run)
    for folder in (run / "adapter", run / "checkpoints" / "step-000004"):
        shutil.rmtree(folder)
    (run / "report.json").unlink()
    mmft.train(recipe, resume=True, quiet=True)
    assert adapter_sha(run) == wanted


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    sets = [{"path": str(pair_rows(20, seed)), "name": f"set{seed}"} for seed in (0, 3)]
    changes = {**NO_MERGE, "data.train": sets}
    mmft.train(values(tmp_path / "one", changes), quiet=True)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path / "two", changes)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outcome = run_process(*launch, "-m", "mmft", "train", path, ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err[-3000:]
    one, two = (tmp_path / name / "runs" / "pairs" for name in ("one", "two"))
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-5)
    for left, right in zip(*(read_lines(run / "metrics.jsonl") for run in (one, two)), strict=True):
        told = [key for key in left if key.startswith(("loss/", "terms/"))]
        assert len(told) == 4
        assert [left[key] for key in told] == pytest.approx([right[key] for key in told], rel=1e-5)


# ---------------------------------------------------------------- what is refused


def test_rows_of_the_other_kind_are_refused(tmp_path):
    chat = {"data.train": [{"path": str(tiny_rows(tmp_path / "chat", 4))}]}
    with pytest.raises(DataError, match="are messages, and objective.name is contrastive"):
        mmft.train(values(tmp_path, {**NO_MERGE, **chat}), quiet=True)
    from tests.runs import values as chat_values

    with pytest.raises(DataError, match="are pairs, and objective.name is sft"):
        mmft.train(chat_values(tmp_path, {"data.train": [{"path": str(pair_rows())}]}), quiet=True)


def test_sigmoid_needs_a_bias(tmp_path):
    with pytest.raises(BackboneError, match="sigmoid loss needs a bias"):
        mmft.train(values(tmp_path, {**NO_MERGE, "objective.loss": "sigmoid"}), quiet=True)


def test_plan_counts_pictures_and_the_tokens_of_texts(tmp_path):
    plan = make_plan(values(tmp_path))
    assert plan["data"]["train"] == len({row["image"] for row in map(json.loads, pair_rows().read_text().splitlines())})
    assert plan["tokens"]["all"]["max"] >= plan["tokens"]["all"]["p50"] > 2
    assert plan["notes"] == [] and plan["memory"]["activations"] > 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"objective.label_smoothing_factor": 0.1}, "contrastive does not read it"),
        ({"objective.name": "sft", "objective.loss": "sigmoid"}, "sft does not read it"),
        (
            {"train.effective_batch_size": 1, "train.per_device_train_batch_size": 1},
            "contrastive with one row in a step",
        ),
        ({"evaluate.metrics": ["bleu"]}, "scored by retrieval"),
        ({"evaluate.group_by": ["type"]}, "not split by tags"),
        ({"adapter.init_lora_weights": "eva"}, "eva looks at batches of conversations"),
        ({"adapter.method": "prompt"}, "a dual encoder has none"),
    ],
)
def test_rules(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        load_recipe(values(tmp_path, changes))
