"""Every method on at least three families, the corner the whole table (`make test-methods`) is cut down to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmft.adapters.build import build_adapters, set_modes
from mmft.adapters.store import load_adapter, save_adapter
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import Backbone, load_backbone
from mmft.engine.optim import build_optimizer
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection, ModelSection, QuantizationSection, TrainSection
from tests.adapters.matrix import FAMILIES, ROWS, cell
from tests.tiny import save_tiny_vlm, tiny_inputs

REFUSED = {
    ("prompt", "qwen2_5_vl"): "M-RoPE",
    ("prefix", "qwen2_5_vl"): "M-RoPE",
    ("prompt", "mllama"): "token table",
    ("prefix", "mllama"): "cross-attention",
    ("prompt", "blip-2"): "token table",
    ("prefix", "blip-2"): "the model keeps",
    ("prompt", "clip"): "writes no tokens",
    ("prefix", "florence2"): "encoder and a decoder",
    ("parallel", "blip-2"): "no module that takes",
}
"""Cells that cannot be, with a word of the reason."""
THREE = ("llava", "mllama", "florence2")


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("prompt", "prefix", "parallel")])
def test_method(row: str, family: str) -> None:
    found = cell(row, family, merge=False)
    assert found.word == "ok", found.reason


@pytest.mark.parametrize(
    ("row", "family"),
    [
        ("prompt", "llava"),
        ("prompt", "smolvlm"),
        ("prefix", "llava"),
        ("prefix", "smolvlm"),
        ("parallel", "qwen2_5_vl"),
        ("parallel", "clip"),
    ],
)
def test_method_elsewhere(row: str, family: str) -> None:
    found = cell(row, family, merge=False)
    assert found.word == "ok", found.reason


@pytest.mark.parametrize(("row", "family"), list(REFUSED))
def test_what_cannot_be_says_why(row: str, family: str) -> None:
    found = cell(row, family)
    assert found.word == "-" and REFUSED[row, family] in found.reason


def test_the_table_is_whole() -> None:
    assert {values["method"] for values in ROWS.values()} == set(METHODS)
    assert len(FAMILIES) == 7


QUANTIZED: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (method, {"method": method}) for method in METHODS if METHODS[method].on_quantized and METHODS[method].peft
) + (("dora", {"method": "lora", "use_dora": True}),)


@pytest.mark.parametrize(("name", "values"), QUANTIZED, ids=[name for name, _ in QUANTIZED])
def test_methods_on_four_bits(name: str, values: dict[str, Any], packed_folder: Path, tmp_path: Path) -> None:
    """Two steps on an NF4 base that keeps its bits, and a save that loads."""
    size = {"lora_rank": 4, "oft_block_size": 8, "bottleneck_size": 8, "num_virtual_tokens": 3}
    targets = {"targets": ["language.norm"]} if name == "ln_tuning" else {}
    adapted = build_adapters(
        packed(packed_folder), AdapterSection.model_validate({**size, **values, **targets}), seed=0
    )
    frozen = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    params = adapted.trainable()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = build_optimizer(adapted, TrainSection(learning_rate=1e-2), params, total_steps=2)
    inputs = tiny_inputs("llava", batch=2)
    for _ in range(2):
        set_modes(adapted)
        optimizer.zero_grad()
        adapted.model(**inputs).logits.square().mean().backward()
        optimizer.step()
    now = dict(adapted.model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    assert any(not torch.equal(before[n], value) for n, value in params.items())
    save_adapter(adapted, tmp_path / "a", base_name="x", base_fingerprint=fingerprint(packed_folder), recipe_digest="")
    with torch.no_grad():
        wanted = adapted.model.eval()(**inputs).logits
        found = load_adapter(packed(packed_folder), tmp_path / "a")(**inputs).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def packed(folder: Path) -> Backbone:
    """The tiny llava with NF4 language layers."""
    quantization = QuantizationSection(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    return load_backbone(ModelSection(name_or_path=str(folder), dtype="float32"), quantization)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("packed") / "base", "llava")
