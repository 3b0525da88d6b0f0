"""Whole captioning runs on tiny captioners: pairs in, LoRA in cross-attention, merge, proof and captions out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmft
from mmft.adapters.build import build_adapters
from mmft.adapters.store import load_adapter
from mmft.backbones.load import load_backbone
from mmft.errors import AdapterError, BackboneError, DataError
from mmft.kinds.captioning import METRICS
from mmft.planning import make_plan
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.objectives.captioners import COMPOSED, SOUNDS, captioner_folder, values
from tests.objectives.pairs import pair_rows
from tests.runs import adapter_sha, read_lines

NO_MERGE = {"data.eval": [], "export.merge": False}
KINDS = (*COMPOSED, "git", "blip", "blip-2", "florence2", "pix2struct", *SOUNDS)


def _loaded(folder: Path):
    return load_backbone(ModelSection(name_or_path=str(folder), dtype="float32"))


@pytest.mark.parametrize("kind", KINDS)
def test_lora_in_cross_attention_changes_that_alone_and_merges_equal(tmp_path, kind):
    """GIT has no cross-attention: its pictures stand in the text's own sequence."""
    report = mmft.train(values(tmp_path, {"train.max_steps": 2}, kind=kind), quiet=True)
    run = tmp_path / "runs" / "captions"
    part = "language" if kind == "git" else "cross_attention"
    assert {row[0] for row in report["training"]["parts"]} == {part}
    base, merged = (load_file(folder / "model.safetensors") for folder in (captioner_folder(kind), run / "merged"))
    backbone = _loaded(captioner_folder(kind))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    touched = report["merge"]["proof"]["touched"]
    assert base.keys() == merged.keys() and len(changed) == touched > 0
    outputs = report["merge"]["proof"]["outputs"]
    assert outputs["checked"] and outputs["positions"] > 4 and outputs["relative"] < 1e-5
    adapted = load_adapter(backbone, run / "adapter")
    names = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    found = {backbone.parts.part_of(name.removeprefix("base_model.model.")) for name in names}
    assert found == {part}
    scores = report["scores"]
    assert scores["merged"]["cider"]["value"] == pytest.approx(scores["adapter"]["cider"]["value"], abs=1e-6)


def test_a_run_learns_and_is_scored(tmp_path):
    changes = {
        "train.max_steps": 120,
        "train.save_steps": 0,
        "train.learning_rate": 3e-3,
        "evaluate.max_new_tokens": 20,
        "evaluate.models": ["base", "adapter"],
        "export.merge": False,
        "adapter": {"method": "full", "targets": ["cross_attention", "language", "vision"]},
        "data.eval": [{"path": str(pair_rows()), "name": "seen"}],
    }
    report = mmft.train(values(tmp_path, changes), quiet=True)
    found = report["sets"]["seen"]
    assert report["headline"] == "cider"
    assert found["scores"]["adapter"]["cider"]["value"] > found["scores"]["base"]["cider"]["value"] + 2
    assert found["paired"]["adapter-base"]["low"] > 0
    losses = [row["loss"] for row in read_lines(tmp_path / "runs" / "captions" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    page = (tmp_path / "runs" / "captions" / "report.html").read_text()
    assert "cider" in page


def test_captions_are_scored_by_all_metrics_without_a_word(tmp_path, monkeypatch):
    recipe = values(tmp_path, {"train.max_steps": 1, "export.merge": False, "evaluate.models": ["adapter"]})
    del recipe["evaluate"]["metrics"]
    monkeypatch.setattr("mmft.kinds.captioning.why_not", lambda: "there is no `java` on the PATH")
    report = mmft.train(recipe, quiet=True)
    assert list(report["scores"]["adapter"]) == [name for name in METRICS if name != "meteor"]
    assert report["left_out"] == {"meteor": "there is no `java` on the PATH"}
    events = (tmp_path / "runs" / "captions" / "events.jsonl").read_text()
    assert "meteor is left out: there is no `java` on the PATH" in events


def test_beams_and_draws_of_a_recipe(tmp_path):
    changes = {**NO_MERGE, "train.max_steps": 1, "evaluate.models": ["adapter"]}
    changes["data.eval"] = [{"path": str(pair_rows(8, 1)), "name": "held"}]
    answers = []
    for place, more in enumerate(
        ({"num_beams": 3}, {"top_p": 0.9}, {"top_p": 0.9, "temperature": 3.0}, {"top_p": 0.9})
    ):
        told = {f"evaluate.{name}": value for name, value in more.items()}
        mmft.train(values(tmp_path / str(place), {**changes, **told}), quiet=True)
        path = tmp_path / str(place) / "runs" / "captions" / "predictions.jsonl"
        answers.append([json.loads(line)["answers"]["adapter"] for line in path.read_text().splitlines()])
    assert answers[1] == answers[3]
    assert len({tuple(found) for found in answers}) == 3


def test_steps_do_not_depend_on_the_micro_batch(tmp_path):
    losses = []
    for size in (2, 8):
        changes = {**NO_MERGE, "train.per_device_train_batch_size": size, "adapter.lora_dropout": 0.0}
        mmft.train(values(tmp_path / str(size), changes), quiet=True)
        rows = read_lines(tmp_path / str(size) / "runs" / "captions" / "metrics.jsonl")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_resumed_run_ends_in_the_same_bytes(tmp_path):
    recipe = values(tmp_path, NO_MERGE)
    run = tmp_path / "runs" / "captions"
    mmft.train(recipe, quiet=True)
    wanted = adapter_sha(run)
    for folder in (run / "adapter", run / "checkpoints" / "step-000004"):
        shutil.rmtree(folder)
    (run / "report.json").unlink()
    mmft.train(recipe, resume=True, quiet=True)
    assert adapter_sha(run) == wanted


def test_a_start_from_data_looks_at_captions(tmp_path):
    report = mmft.train(values(tmp_path, {"adapter.init_lora_weights": "eva", "train.max_steps": 1}), quiet=True)
    assert report["merge"]["proof"]["outputs"]["checked"]


def test_plan_preview_and_trace(tmp_path):
    recipe = values(tmp_path)
    plan = make_plan(recipe)
    assert plan["tokens"]["all"]["max"] > 4 and plan["memory"]["activations"] > 0
    page = mmft.preview(recipe, out=tmp_path / "page.html")
    assert 'class="t trained"' in Path(page).read_text()
    stations = {row["station"] for row in mmft.trace(recipe)}
    assert {"4 media", "6 collate", "7 objective", "10 merge"} <= stations


def test_halves_of_a_processor_are_put_together(tmp_path):
    """A composed model's folder often holds a tokenizer and an image processor, and names no class for both."""
    folder = tmp_path / "halves"
    shutil.copytree(captioner_folder("bart"), folder)
    whole = _loaded(folder).processor
    (folder / "processor_config.json").unlink()
    whole.image_processor.save_pretrained(folder)
    whole.tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").unlink(missing_ok=True)
    found = _loaded(folder).processor
    assert found.tokenizer("red")["input_ids"] == whole.tokenizer("red")["input_ids"]
    assert found.image_processor.size == whole.image_processor.size


# ---------------------------------------------------------------- what is refused


def _rows(folder: Path, *rows: dict) -> list[dict]:
    shutil.copytree(pair_rows(8).parent, folder, dirs_exist_ok=True)
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(folder / "mine.jsonl")}]


GOOD = {"image": "0.png", "caption": "red"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"image": "1.png", "caption": " "}, "a caption is empty"),
        ({"image": "1.png", "captions": ["red", ""]}, "a caption is empty"),
        ({"caption": "a text alone"}, "the row has no picture"),
        ({"image": "1.png", "caption": "long " * 20}, "the row has 100 tokens"),
        ({"image": "gone.png", "caption": "red"}, "gone.png"),
    ],
    ids=["empty", "one empty", "text only", "over-long", "no file"],
)
def test_bad_rows_are_named(tmp_path, row, text):
    source = [{**_rows(tmp_path / "rows", GOOD, row)[0], "format": "pairs"}]
    with pytest.raises(DataError, match=text) as caught:
        mmft.train(values(tmp_path, {**NO_MERGE, "data.train": source}), quiet=True)
    assert "mine.jsonl:2" in str(caught.value)


@pytest.mark.parametrize("way", ["drop", "truncate_text"])
def test_an_over_long_caption_is_dropped_or_cut(tmp_path, way):
    source = _rows(tmp_path / "rows", GOOD, {"image": "1.png", "caption": "long " * 20})
    changes = {**NO_MERGE, "data.train": source, "data.over_length": way, "train.max_steps": 1}
    report = mmft.train(values(tmp_path, changes), quiet=True)
    assert report["training"]["rows"] == (1 if way == "drop" else 2)
    events = read_lines(tmp_path / "runs" / "captions" / "events.jsonl")
    told = next(row for row in events if row["kind"] == "long_rows")
    assert told["done"] == ("dropped" if way == "drop" else "cut") and len(told["rows"]) == 1


def test_sounds_and_pictures_are_told_apart(tmp_path):
    from tests.objectives.captioners import sound_rows

    for kind, source, text in (("bart", sound_rows(), "kind audio"), ("whisper", pair_rows(), "kind image")):
        changes = {**NO_MERGE, "data.train": [{"path": str(source)}]}
        with pytest.raises(DataError, match=text):
            mmft.train(values(tmp_path / kind, changes, kind=kind), quiet=True)


def test_a_model_without_cross_attention_says_so():
    with pytest.raises(AdapterError, match="cross_attention"):
        build_adapters(_loaded(captioner_folder("git")), AdapterSection(targets=("cross_attention",)), seed=0)


def test_a_decoder_without_a_start_is_refused(tmp_path):
    folder = tmp_path / "nostart"
    shutil.copytree(captioner_folder("bart"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("decoder_start_token_id")
    config["decoder"].pop("decoder_start_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="has no decoder_start_token_id"):
        mmft.train(values(tmp_path, {**NO_MERGE, "model.name_or_path": str(folder)}), quiet=True)
