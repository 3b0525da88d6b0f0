"""NF4 and int8 on a CPU: which layers, what weights, and that evaluation does not break training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmft.adapters.build import build_adapters, set_modes
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.parts import count
from mmft.backbones.quantize import dequantized_weight, guard_cpu, quantized_names
from mmft.errors import AdapterError, BackboneError
from mmft.recipe.schema import AdapterSection, ModelSection, PartAdapter, QuantizationSection
from tests.tiny import save_tiny_vlm, tiny_inputs, tiny_vlm

NF4 = QuantizationSection(load_in_4bit=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("q"), "llava")


def load(folder: Path, quantization: QuantizationSection = NF4) -> Backbone:
    return load_backbone(ModelSection(name_or_path=str(folder), dtype="bfloat16"), quantization)


def test_exactly_the_named_parts_are_quantized(folder: Path) -> None:
    backbone = load(folder)
    assert backbone.quantized
    assert quantized_names(backbone.model) == backbone.parts.linears("language")
    plain, _ = tiny_vlm("llava")
    rows = count(backbone.model, backbone.parts)
    assert sum(row["parameters"] for row in rows.values()) == sum(p.numel() for p in plain.parameters())
    both = load(folder, QuantizationSection(load_in_8bit=True, parts=("language", "vision")))
    assert set(quantized_names(both.model)) == {*both.parts.linears("language"), *both.parts.linears("vision")}


def test_widths_that_the_cpu_kernel_gets_wrong_stay_in_16_bits(folder: Path) -> None:
    section = QuantizationSection(load_in_4bit=True, parts=("language", "projector"))
    with pytest.warns(UserWarning, match=r"1 of 16 layers stay in 16 bits.*multiples of 64"):
        backbone = load(folder, section)
    assert backbone.model.get_submodule("model.multi_modal_projector.linear_1").in_features == 24
    assert set(quantized_names(backbone.model)) == {
        *backbone.parts.linears("language"),
        "model.multi_modal_projector.linear_2",
    }
    with pytest.raises(BackboneError, match="none of the 12 layers can be quantized on a CPU"):
        load(folder, QuantizationSection(load_in_4bit=True, parts=("vision",)))


def test_the_cpu_kernel_of_bitsandbytes_is_wrong_for_other_widths() -> None:
    """When this fails, bitsandbytes has been mended and the rule above can go."""
    from bitsandbytes import functional

    errors = {}
    for width in (64, 96):
        weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
        packed, state = functional.quantize_4bit(weight, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weight).abs().reshape(-1, 64)
        errors[width] = float((error / weight.reshape(-1, 64).abs().amax(1, keepdim=True)).max())
    assert errors[64] < 0.16 < errors[96]


def test_a_part_that_does_not_exist_cannot_be_quantized(folder: Path) -> None:
    with pytest.raises(BackboneError, match="no linear layers in part 'audio'") as caught:
        load(folder, QuantizationSection(load_in_4bit=True, parts=("audio",)))
    assert "quantization.parts" in str(caught.value)


@pytest.mark.parametrize("quantization", [NF4, QuantizationSection(load_in_8bit=True)], ids=["nf4", "int8"])
def test_dequantized_weights_are_near_the_original_and_are_what_is_computed(
    folder: Path, quantization: QuantizationSection
) -> None:
    backbone = load(folder, quantization)
    plain, _ = tiny_vlm("llava")
    for name in quantized_names(backbone.model)[:4]:
        layer, original = backbone.model.get_submodule(name), plain.get_submodule(name).weight
        weight = dequantized_weight(layer, torch.float32)
        assert weight.shape == original.shape
        steps = 0.16 if quantization.load_in_4bit else 0.01  # half the widest gap of NF4, of int8, over the maximum
        assert (weight - original).abs().max() <= steps * original.abs().max() + 1e-3
        x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = x.float() @ weight.T
            assert (layer(x).float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("quantization", [NF4, QuantizationSection(load_in_8bit=True)], ids=["nf4", "int8"])
def test_an_evaluation_does_not_change_the_next_gradient(folder: Path, quantization: QuantizationSection) -> None:
    backbone = load(folder, quantization)
    adapted = build_adapters(backbone, AdapterSection(lora_rank=2), seed=0)
    inputs = tiny_inputs("llava")

    def gradients() -> dict[str, torch.Tensor]:
        set_modes(adapted)
        adapted.model.zero_grad()
        adapted.model(**inputs).logits.float().square().mean().backward()
        return {name: value.grad.clone() for name, value in adapted.trainable().items() if value.grad is not None}

    before = gradients()
    adapted.model.eval()
    with torch.no_grad():
        adapted.model(**inputs)
    after = gradients()
    assert before.keys() == after.keys() == adapted.trainable().keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(float(value.abs().sum()) for value in before.values()) > 0


def test_the_guard_reaches_every_layer(folder: Path) -> None:
    backbone = load(folder)
    names = quantized_names(backbone.model)
    assert not any(backbone.model.get_submodule(name).support_avx512bf16_for_cpu for name in names)
    assert guard_cpu(backbone.model) == len(names)


def test_quantized_weights_cannot_be_trained_in_full(folder: Path) -> None:
    adapter = AdapterSection(targets=("projector",), parts={"language": PartAdapter(mode="full")})
    with pytest.raises(AdapterError, match="part 'language' is quantized"):
        build_adapters(load(folder), adapter, seed=0)
    with pytest.raises(AdapterError, match="part 'language' is quantized"):
        build_adapters(load(folder), AdapterSection(method="full", targets=("language.mlp",)), seed=0)
