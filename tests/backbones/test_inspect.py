"""Inspection on the meta device says what the real model says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from mmft.backbones.inspect import inspect_model
from mmft.backbones.load import load_backbone
from mmft.backbones.parts import count
from mmft.errors import AdapterError, BackboneError
from mmft.recipe.schema import ModelSection
from mmft.summary import inspect_text
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
    with pytest.raises(AdapterError, match="target 'projecter' matches nothing: this model has no part"):
        inspect_model("qwen2_vl", targets=["projecter"])
    with pytest.raises(BackboneError, match="gpt2 is a gpt2 model, not a vision-language model"):
        inspect_model("gpt2")


def test_layers_and_exclusions_narrow_what_targets_hit(tmp_path: Path) -> None:
    folder = str(save_tiny_vlm(tmp_path / "m", "llava"))
    top = "model.language_model.layers"
    found = inspect_model(
        folder, targets=["language.attention,projector"], layers="last:1", exclude=["k_proj", "*.o_*"]
    )
    assert found["targets"] == [
        f"{top}.1.self_attn.q_proj",
        f"{top}.1.self_attn.v_proj",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    assert all(name in inspect_text(found) for name in found["targets"])


def plain_peft(folder: Path, out: Path, **lora: Any) -> Path:
    """An adapter as a user of plain peft would make it."""
    import peft

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    peft.get_peft_model(model, peft.LoraConfig(**lora)).save_pretrained(out)
    return out


def test_a_plain_peft_adapter_that_hits_the_tower_too(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "m", "llava")
    made = plain_peft(folder, tmp_path / "a", r=4, target_modules=["q_proj", "v_proj"])
    found = inspect_model(None, adapter=made)["adapter"]  # the base is the one that the adapter names
    layers = {part: [f"{i}.self_attn.{x}" for i in (0, 1) for x in ("q_proj", "v_proj")] for part in found["parts"]}
    tops = {"vision": "model.vision_tower.encoder.layers", "language": "model.language_model.layers"}
    assert {part: row["modules"] for part, row in found["parts"].items()} == {
        part: [f"{top}.{end}" for end in layers[part]] for part, top in tops.items()
    }
    # Rank 4: A is (4, in), B is (out, 4). Tower 24 wide; language 64 wide, with values of 2 heads of 16.
    assert found["parts"]["vision"]["parameters"] == 2 * 2 * 4 * (24 + 24)
    assert found["parts"]["language"]["parameters"] == 2 * 4 * ((64 + 64) + (64 + 32))
    assert (found["method"], found["ranks"], found["unknown"]) == ("lora", [4], [])
    assert found["parameters"] == sum(row["parameters"] for row in found["parts"].values())
    assert found["warnings"] == ["4 of the 8 adapted modules lie in the vision tower (target_modules: q_proj, v_proj)"]
    assert "WARNING: 4 of the 8 adapted modules lie in the vision tower" in inspect_text(
        inspect_model(str(folder), adapter=made)
    )


@pytest.mark.parametrize(
    ("new", "known"),
    [
        ("base_model.model.language_model.model.layers", True),  # transformers before 4.52
        ("language_model.model.layers", True),
        ("base_model.model.base_model.model.model.language_model.layers", True),  # wrapped twice
        ("module.model.language_model.layers", True),
        ("base_model.model.decoder.blocks", False),
    ],
)
def test_other_spellings_of_the_keys(new: str, known: bool, tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "m", "llava")
    exact = r"model\.language_model\.layers\.\d+\.self_attn\.q_proj"
    made = plain_peft(folder, tmp_path / "a", r=2, target_modules=exact)
    expected = inspect_model(str(folder), adapter=made)["adapter"]
    assert list(expected["parts"]) == ["language"] and expected["warnings"] == []
    weights = load_file(made / "adapter_model.safetensors")
    old = "base_model.model.model.language_model.layers"
    save_file({key.replace(old, new): value for key, value in weights.items()}, made / "adapter_model.safetensors")
    found = inspect_model(str(folder), adapter=made)["adapter"]
    if known:
        assert {k: v for k, v in found.items()} == expected
    else:
        assert found["parts"] == {} and len(found["unknown"]) == len(weights)
        assert found["warnings"][0].startswith(f"{len(weights)} of {len(weights)} tensors name nothing in this model")


def test_saved_modules_and_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "m", "llava")
    made = plain_peft(
        folder,
        tmp_path / "a",
        r=2,
        target_modules=r".*language_model.*q_proj",
        modules_to_save=["multi_modal_projector"],
    )
    found = inspect_model(str(folder), adapter=made)["adapter"]
    assert found["unknown"] == [] and list(found["parts"]) == ["projector", "language"]
    assert found["parts"]["projector"]["parameters"] == 24 * 64 + 64 + 64 * 64 + 64
    with pytest.raises(AdapterError, match="holds no adapter_config.json"):
        inspect_model(str(folder), adapter=folder)
    with pytest.raises(BackboneError, match="no model is named"):
        inspect_model(None)
