"""Inspection on the meta device says what the real model says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.backbones.inspect import inspect_model
from mmft.backbones.load import load_backbone
from mmft.backbones.parts import count
from mmft.errors import AdapterError, BackboneError
from mmft.recipe.schema import ModelSection
from tests.tiny import WORKING, save_tiny_vlm


@pytest.mark.parametrize("kind", WORKING)
@pytest.mark.parametrize("tie", [False, True])
def test_numbers_are_those_of_the_loaded_model(kind: str, tie: bool, tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / kind, kind, tie=tie)
    found = inspect_model(str(folder))
    backbone = load_backbone(ModelSection(name_or_path=str(folder), dtype="float32"))
    assert found["parameters"] == sum(p.numel() for p in backbone.model.parameters())
    rows = count(backbone.model, backbone.parts)
    assert {part: row["parameters"] for part, row in found["parts"].items()} == {
        part: row["parameters"] for part, row in rows.items()
    }
    for part, row in found["parts"].items():
        assert row["linears"] == backbone.parts.linears(part)
        assert row["parameters"] == sum(sub["parameters"] for sub in row["subparts"].values())
    assert found["model_type"] == backbone.model.config.model_type


def test_a_bare_model_type_and_targets() -> None:
    found = inspect_model("qwen2_vl", targets=["projector"])
    assert found["model_type"] == "qwen2_vl"
    assert found["parts"]["projector"]["modules"] == ["model.visual.merger"]
    assert found["targets"] == ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"]
    with pytest.raises(AdapterError, match="target 'projecter' matches nothing in this model"):
        inspect_model("qwen2_vl", targets=["projecter"])
    with pytest.raises(BackboneError, match="bert is a bert model, not a vision-language model"):
        inspect_model("bert")
