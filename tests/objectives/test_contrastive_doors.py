"""`mmft plan`, `mmft preview` and `mmft trace` of contrastive recipes; classes of rows in an evaluation."""

from __future__ import annotations

import pytest
import transformers

import mmft
from mmft.errors import DataError, RecipeError
from mmft.planning import make_plan, write_recipe_preview
from mmft.tracing import trace_row
from tests.objectives.pairs import values
from tests.objectives.test_sound_pairs import sound_rows, tiny_clap
from tests.runs import workshop

SOUNDS = {
    "adapter.targets": ["language.attention", "audio.attention"],
    "data.eval": [],
    "export.merge": False,
}


def _sounds(tmp_path):
    told = {**SOUNDS, "model.name_or_path": str(tiny_clap()), "data.train": [{"path": str(sound_rows())}]}
    return values(tmp_path, told)


def test_a_plan_counts_pairs_parts_and_activations(tmp_path):
    plan = make_plan(values(tmp_path))
    assert plan["data"] == {"train": 32, "held": 8} and plan["tokens"]["all"]["max"] >= 3
    assert plan["steps"] == {"total": 4, "rows_per_step": 16, "epochs": 2.0}
    trained = {part["part"]: part["trainable"] for part in plan["parts"]}
    assert trained["vision"] > 0 and trained["language"] > 0
    assert plan["memory"]["activations"] > 0 and plan["memory"]["logits"] == 4 * 16 * 16 * 4
    assert plan["notes"] == []
    assert make_plan(_sounds(tmp_path))["data"] == {"train": 32}


def test_a_preview_shows_pictures_texts_and_hard_negatives(tmp_path):
    page = write_recipe_preview(values(tmp_path), rows=3, out=tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "pair-0" in page
    assert 'class="wrong" title="not red"' in page and 'class="plain" title="a red square"' in page
    assert "pixel_values (1, 3, " in page and "<script" not in page
    page = write_recipe_preview(_sounds(tmp_path), rows=2, out=tmp_path / "sounds.html").read_text()
    assert page.count("a sound") == 2 and "input_features" in page


@pytest.mark.parametrize("kind", ["dual", "siglip"])
def test_a_trace_goes_through_the_ten_stations(tmp_path, kind):
    loss = "sigmoid" if kind == "siglip" else "infonce"
    stations = trace_row(values(tmp_path, {"objective.loss": loss}, kind=kind), row=1)
    names = [station["station"].split()[0] for station in stations]
    assert [name for name in dict.fromkeys(names)] == ["1", "2", "3", "4", "6", "7", "8", "9", "10"]
    again = trace_row(values(tmp_path, {"objective.loss": loss}, kind=kind), row=1)
    assert [one["digest"] for one in stations] == [one["digest"] for one in again]
    assert "0 frozen with gradient" in next(one["shape"] for one in stations if one["station"].startswith("8"))


def test_a_trace_of_sounds(tmp_path):
    stations = trace_row(_sounds(tmp_path))
    assert any("input_features" in station["what"] for station in stations)
    assert any(station["station"] == "4 media" and "sound" in station["what"] for station in stations)


def test_classes_are_scored_by_sentences_and_by_a_probe(tmp_path):
    changes = {
        "train.max_steps": 30,
        "train.save_steps": 0,
        "evaluate.class_tag": "group",
        "evaluate.templates": ["{}", "a {} square"],
    }
    report = mmft.train(values(tmp_path, changes), quiet=True)
    found = report["sets"]["held"]
    for model in ("base", "adapter", "merged"):
        for name in ("zero_shot_top1", "zero_shot_top5", "linear_probe_accuracy"):
            one = found["scores"][model][name]
            assert one["low"] <= one["value"] <= one["high"] and one["n"] == 8
    gain = found["paired"]["adapter-base"]["metrics"]["zero_shot_top1"]
    values_ = [found["scores"][model]["zero_shot_top1"]["value"] for model in ("adapter", "base")]
    assert gain["difference"] == pytest.approx(values_[0] - values_[1]) and values_[0] > values_[1] + 0.3
    page = (tmp_path / "runs" / "pairs" / "report.html").read_text()
    assert "zero shot top1" in page and "linear probe accuracy" in page


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate.class_tag": "group", "objective.name": "sft"}, "classifies with a dual encoder"),
        ({"evaluate.templates": ["a photo"]}, r"every template needs one \{\}"),
    ],
)
def test_rules_of_classes(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        mmft.validate(values(tmp_path, changes))


def test_rows_without_a_class_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"8 of 8 rows of 'held' have no tag 'sort'"):
        mmft.train(values(tmp_path, {"evaluate.class_tag": "sort", "train.max_steps": 1}), quiet=True)


def test_any_two_towers_become_a_recipes_base(tmp_path):
    """The three lines of the README: a tower that sees and one that reads, saved as one folder with a processor."""
    from tests.families.tiny import shrink
    from tests.objectives.pairs import tiny_dual

    folder = workshop() / "two-towers"
    transformers.ViTModel(shrink("vit")).save_pretrained(folder / "sees")
    transformers.BertModel(shrink("bert")).save_pretrained(folder / "reads")
    model = transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(folder / "sees"), str(folder / "reads")
    )
    model.save_pretrained(folder / "both")
    transformers.AutoProcessor.from_pretrained(tiny_dual()).save_pretrained(folder / "both")
    changes = {"model.name_or_path": str(folder / "both"), "train.max_steps": 2, "adapter.targets": ["projector"]}
    report = mmft.train(values(tmp_path, changes), quiet=True)
    assert report["merge"]["proof"]["embeddings"]["max_difference"] <= 1e-5
