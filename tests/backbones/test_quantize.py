"""NF4 and int8 on a CPU: which layers, what weights, and that evaluation does not break training."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from mmft.adapters.build import build_adapters, set_modes
from mmft.backbones import quantize
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.parts import count
from mmft.backbones.quantize import Stored, dequantized_weight, guard_cpu, quantized_names, stored_quantization
from mmft.errors import AdapterError, BackboneError
from mmft.recipe.schema import AdapterSection, ModelSection, PartAdapter, QuantizationSection
from tests.tiny import save_tiny_vlm, tiny_inputs, tiny_vlm
from tests.tiny_quantized import KINDS, SECTIONS, save_quantized

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


# ---------------------------------------------------------------- steps, and checkpoints that are quantized already


def plain(value: torch.Tensor) -> torch.Tensor:
    """A copy that can be compared; torchao's tensors cannot."""
    return value.dequantize() if type(value).__module__.startswith("torchao") else value.clone()


def step(backbone: Backbone, kind: str = "llava") -> float:
    """One optimizer step on a LoRA; the loss before minus the loss after. Only adapter weights may move."""
    adapted = build_adapters(backbone, AdapterSection(lora_rank=2, targets=("language.attention",)), seed=0)
    inputs = tiny_inputs(kind)
    frozen = {name: plain(value) for name, value in adapted.model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.SGD(adapted.trainable().values(), lr=0.02)

    def loss() -> torch.Tensor:
        logits = adapted.model(**inputs).logits.float()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())

    set_modes(adapted)
    first = loss()
    first.backward()
    assert all(value.grad is not None for value in adapted.trainable().values())
    optimizer.step()
    adapted.model.eval()
    with torch.no_grad():
        second = loss()
    state = adapted.model.state_dict()
    assert all(torch.equal(value, plain(state[name])) for name, value in frozen.items())
    return float(first.detach() - second)


FP4 = QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
INT8 = QuantizationSection(load_in_8bit=True)


@pytest.mark.parametrize("section", [NF4, FP4, INT8], ids=["nf4-double", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl", "mllama"])
def test_every_kind_takes_a_step(kind: str, section: QuantizationSection, tmp_path: Path) -> None:
    backbone = load(save_tiny_vlm(tmp_path / kind, kind), section)
    assert quantized_names(backbone.model) and not set(quantized_names(backbone.model)) & set(
        backbone.parts.linears("vision")
    )
    assert step(backbone, kind) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_checkpoint_is_trained_as_it_is(kind: str, tmp_path: Path) -> None:
    """Loaded again it gives the outputs of the model it was saved from, and a step lowers the loss; repeating the
    quantization it was made with is allowed."""
    quantized, model = save_quantized(tmp_path / "q", kind)
    for section in (QuantizationSection(), SECTIONS[kind]):
        backbone = load(quantized, section)
        assert backbone.quantized and quantized_names(backbone.model) == quantized_names(model)
        with torch.no_grad():
            inputs = tiny_inputs("llava")
            assert torch.equal(backbone.model(**inputs).logits, model(**inputs).logits)
    assert step(backbone) > 0


@pytest.mark.parametrize(
    "field, values",
    [
        ("load_in_8bit", {"load_in_8bit": True}),
        ("bnb_4bit_quant_type", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("bnb_4bit_use_double_quant", {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}),
    ],
)
def test_a_contradiction_is_named(field: str, values: dict, tmp_path: Path) -> None:
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"quantization_config": {**stated, "bnb_4bit_use_double_quant": True}}
    with pytest.raises(BackboneError, match=rf"quantization\.{field} is (true|false|fp4), but .* already") as caught:
        stored_quantization(config, QuantizationSection(**values), name="org/m")
    assert "bitsandbytes, 4 bits, nf4, double" in str(caught.value) and "org/m" in str(caught.value)


@pytest.mark.parametrize("place", ["top", "text_config", "compression_config"])
def test_where_the_quantization_is_stated(place: str) -> None:
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = {
        "top": {"quantization_config": stated},
        "text_config": {"text_config": {"quantization_config": stated}},
        "compression_config": {"compression_config": stated},
    }[place]
    assert stored_quantization(config, name="m") == Stored("bitsandbytes", 8)
    assert stored_quantization({"text_config": {}}, name="m") is None
    with pytest.raises(BackboneError, match="not whether 4 or 8 bits"):
        stored_quantization({"quantization_config": {"quant_method": "bitsandbytes"}}, name="m")


@pytest.mark.parametrize(
    "method, what, do",
    [
        ("gptq", "gptqmodel, optimum is not installed", "pip install gptqmodel optimum"),
        ("awq", "gptqmodel is not installed", "pip install gptqmodel"),
        ("aqlm", "aqlm[gpu,cpu] is not installed", "pip install aqlm[gpu,cpu]"),
        ("eetq", "is not installed", "pip install"),
        ("hqq", "transformers 5 cannot load it", "16-bit checkpoint"),
        ("fp8", "no backward pass", "16-bit checkpoint"),
        ("mxfp4", "no backward pass", "16-bit checkpoint"),
        ("compressed-tensors", "no LoRA layer", "16-bit checkpoint"),
        ("brand-new", "mmft does not know this method", "16-bit checkpoint"),
    ],
)
def test_other_methods_are_refused_before_weights_are_read(
    method: str, what: str, do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From config.json alone: the folder's weights are no safetensors at all."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as where none of the packages is
    config = json.loads((save_tiny_vlm(tmp_path / "m", "llava") / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    (tmp_path / "m/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BackboneError) as caught:
        stored_quantization(
            json.loads((tmp_path / "m/config.json").read_text()), QuantizationSection(), name="org/quantized"
        )
    text = str(caught.value)
    assert method in text and what in text and do in text and "org/quantized, config.json" in text


def test_every_method_of_transformers_has_an_answer() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    known = {*quantize._TRAINABLE, *quantize._REFUSED, "bitsandbytes_4bit", "bitsandbytes_8bit"}
    assert set(AUTO_QUANTIZER_MAPPING) == known


def test_torchao(folder: Path, tmp_path: Path) -> None:
    """Weight-only int8 trains; a type that quantizes activations is refused, because no gradient passes it."""
    torchao = pytest.importorskip("torchao.quantization", reason="extra torchao")
    import transformers

    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    for kind in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
        quantizer = transformers.TorchAoConfig(getattr(torchao, kind)(), modules_to_not_convert=skipped)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=quantizer
        )
        model.save_pretrained(tmp_path / kind)
        for file in folder.iterdir():
            if not (tmp_path / kind / file.name).exists():
                (tmp_path / kind / file.name).write_bytes(file.read_bytes())
    backbone = load(tmp_path / "Int8WeightOnlyConfig", QuantizationSection())
    assert backbone.quantized and quantized_names(backbone.model) == backbone.parts.linears("language")
    assert step(backbone) > 0
    with pytest.raises(BackboneError, match="torchao's Int8DynamicActivationInt8WeightConfig"):
        load(tmp_path / "Int8DynamicActivationInt8WeightConfig", QuantizationSection())


def test_stored_widths_that_the_cpu_kernel_gets_wrong(folder: Path, tmp_path: Path) -> None:
    import transformers

    quantizer = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head"])
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantizer
    )
    model.save_pretrained(tmp_path / "q")
    for file in folder.iterdir():
        if not (tmp_path / "q" / file.name).exists():
            (tmp_path / "q" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BackboneError, match=r"stored 4-bit layers have input widths .* computes wrongly on a CPU"):
        load(tmp_path / "q", QuantizationSection())
