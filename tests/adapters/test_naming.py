"""peft takes the names it is given: its conversion of transformers 4's names must not touch exact ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmft.adapters.build import build_adapters, lora_layers
from mmft.adapters.folder import peft_tensors, put_tensors
from mmft.adapters.naming import names_as_given
from mmft.adapters.store import load_adapter, save_adapter
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import load_backbone, model_class
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.families.kinds_a2 import KINDS

NAMES = ["model.visual.merger.gate_proj", "model.visual.merger.up_proj", "model.visual.merger.down_proj"]


def _folder(where: Path) -> Path:
    torch.manual_seed(0)
    config = KINDS["glm4v_moe"]().config
    model_class(config)._from_config(config).save_pretrained(where)
    return where


def _section(folder: Path) -> ModelSection:
    return ModelSection(name_or_path=str(folder), dtype="float32", attn_implementation="eager")


def test_upstream_still_takes_a_projector_for_experts(tmp_path: Path) -> None:
    model = load_backbone(_section(_folder(tmp_path / "base")), processor=False).model
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=NAMES))
    assert set(lora_layers(wrapped)) != set(NAMES), "peft takes exact names now: names_as_given can go"


def test_exact_names_are_wrapped_saved_and_loaded(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base")
    backbone = load_backbone(_section(base), processor=False)
    adapted = build_adapters(backbone, AdapterSection(targets=("projector",), lora_rank=2), seed=0)
    assert set(NAMES) <= set(lora_layers(adapted.model))
    with torch.no_grad():
        for value in adapted.trainable().values():
            value.normal_()
    save_adapter(
        adapted, tmp_path / "one", base_name=str(base), base_fingerprint=fingerprint(base), recipe_digest="0" * 64
    )
    again = peft_tensors(load_adapter(load_backbone(_section(base), processor=False), tmp_path / "one"))
    held = peft_tensors(adapted.model)
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], held[name]) for name in held)


@pytest.mark.parametrize("stated", [True, False])
def test_the_config_is_as_before_also_after_an_error(stated: bool) -> None:
    config = SimpleNamespace(model_type="some", **({"tie_word_embeddings": True} if stated else {}))
    before = dict(vars(config))
    with pytest.raises(KeyError), names_as_given(SimpleNamespace(config=config), SimpleNamespace(peft_type="LORA")):
        assert config.model_type != "some"
        assert config.tie_word_embeddings is stated
        raise KeyError
    assert vars(config) == before


def test_every_value_is_read_back(tmp_path: Path) -> None:
    adapted = build_adapters(
        load_backbone(_section(_folder(tmp_path / "base")), processor=False),
        AdapterSection(targets=("language.attention",), lora_rank=2),
        seed=0,
    )
    wanted = {name: torch.randn_like(value) for name, value in peft_tensors(adapted.model).items()}
    put_tensors(adapted.model, wanted, tmp_path)
    held = peft_tensors(adapted.model)
    assert all(torch.equal(held[name], value) for name, value in wanted.items())
