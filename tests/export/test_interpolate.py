"""Models between base and tuned: (1 - a) base + a tuned, for adapters and for parts that were trained whole."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mmft
from mmft.errors import ExportError, RecipeError
from mmft.export.interpolate import interpolate, interpolate_models
from mmft.files import verify_folder
from mmft.summary import summary_text
from tests.objectives.pairs import tiny_dual, values
from tests.runs import workshop

ALPHAS = [0.5, 0.25, 0.75]


@functools.cache
def _run() -> tuple[Path, dict]:
    """LoRA in both towers and projections trained whole; the models between are scored."""
    folder = workshop() / "interpolated"
    changes = {
        "adapter.targets": ["language.attention", "vision.attention", "projector"],
        "adapter.parts": {"projector": {"mode": "full"}},
        "train.max_steps": 12,
        "export.interpolate": ALPHAS,
    }
    report = mmft.train(values(folder, changes), quiet=True)
    return folder / "runs" / "pairs", report


def test_the_written_weights_are_between_both():
    run, report = _run()
    base, tuned = load_file(tiny_dual() / "model.safetensors"), load_file(run / "merged" / "model.safetensors")
    found = load_file(run / "interpolated" / "model.safetensors")
    verify_folder(run / "interpolated")
    assert report["interpolation"]["written"] == 0.5 and found.keys() == base.keys()
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert any("projection" in name for name in changed) and any("query" in name for name in changed)
    for name, value in found.items():
        exact = 0.5 * base[name].double() + 0.5 * tuned[name].double()
        # float32 sums of two terms: each rounding is at most half a unit of the larger of them
        room = 2.0**-23 * (base[name].double().abs() + tuned[name].double().abs())
        assert bool(((value.double() - exact).abs() <= room).all()), name
        if name not in changed:
            assert torch.equal(value, base[name])
    transformers.VisionTextDualEncoderModel.from_pretrained(run / "interpolated")


def test_for_lora_it_is_the_adapter_at_a_smaller_scale():
    run, _ = _run()
    model = PeftModel.from_pretrained(
        transformers.VisionTextDualEncoderModel.from_pretrained(tiny_dual()), run / "adapter"
    )
    name = "text_model.encoder.layer.0.attention.self.query"
    layer = dict(model.get_base_model().named_modules())[name]
    wanted = layer.base_layer.weight + 0.5 * layer.get_delta_weight("default")
    found = load_file(run / "interpolated" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(found, wanted.detach(), atol=1e-6)


def test_the_curve_stands_in_the_report():
    run, report = _run()
    scores = report["interpolation"]["sets"]["held"]
    assert list(scores) == ["0", "0.25", "0.5", "0.75", "1"]
    one = scores["0.5"]["image_to_text_r@1"]
    assert one["low"] <= one["value"] <= one["high"]
    assert scores["0"]["text_to_image_map"] == report["sets"]["held"]["scores"]["base"]["text_to_image_map"]
    chart = report["charts"][0]
    assert [x for x, _ in chart["series"]["held"]] == [0, 0.25, 0.5, 0.75, 1]
    assert "between base (0) and tuned (1)" in (run / "report.html").read_text()
    lines = summary_text(report)
    assert "held from base (0) to tuned (1): 0: " in lines and f"the model at 0.5: {run / 'interpolated'}" in lines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_rounding_and_exact_ends(dtype, alpha):
    torch.manual_seed(0)
    base, tuned = torch.randn(2, 50).to(dtype).unbind(0)
    exact = (1 - alpha) * base.double() + alpha * tuned.double()
    # Float32 sums stand behind the one rounding to bfloat16, so half a unit and a little.
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=1.0)
    assert bool(((interpolate(base, tuned, alpha).double() - exact).abs() <= unit).all())
    assert torch.equal(interpolate(base, base, alpha), base)
    assert torch.equal(interpolate(base, tuned, 0.0), base) and torch.equal(interpolate(base, tuned, 1.0), tuned)


def test_shards_scalars_and_what_does_not_fit(tmp_path):
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        tensors = {"a": torch.full((4, 8), shift), "b": torch.full((4, 8), 2 * shift), "s": torch.tensor(shift)}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    out = interpolate_models(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", alpha=0.25, max_shard_size=160)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    values_ = {name: load_file(out / file)[name].unique().tolist() for name, file in index.items()}
    assert values_ == {"a": [0.25], "b": [0.5], "s": [0.25]}
    with pytest.raises(ExportError, match="alpha is 1.5"):
        interpolate_models(tmp_path / "base", tmp_path / "tuned", tmp_path / "more", alpha=1.5)
    save_file({"a": torch.zeros(3)}, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="do not hold the same tensors: a, b, s"):
        interpolate_models(tmp_path / "base", tmp_path / "tuned", tmp_path / "more", alpha=0.5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"export.interpolate": [1.0]}, "0 is the base and 1 the tuned model"),
        ({"export.interpolate": [0.5], "export.merge": False}, "needs a merged model"),
        ({"export.interpolate": [0.5], "objective.name": "sft"}, "objective.name is sft"),
    ],
)
def test_rules(tmp_path, changes, text):
    with pytest.raises(RecipeError, match=text):
        mmft.validate(values(tmp_path, changes))
