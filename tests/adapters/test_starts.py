"""Starts of B A against peft's own, and what is saved of them: an ordinary LoRA for the base as it is."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mmft.adapters.build import Adapted, build_adapters, lora_layers
from mmft.adapters.starts import START, matrix
from mmft.adapters.store import CONFIG, load_adapter, save_adapter
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.parts import find_parts
from mmft.backbones.quantize import quantized_names
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection, ModelSection, QuantizationSection
from tests.tiny import save_tiny_vlm, tiny_inputs, tiny_vlm

VALUES: dict[str, Any] = {
    "targets": ["language.attention", "projector"],
    "lora_rank": 4,
    "lora_alpha": 6.0,
    "parts": {"projector": {"lora_rank": 2, "lora_alpha": 5.0}},
}


def backbone() -> Backbone:
    model = tiny_vlm("llava")[0]
    return Backbone(model, None, find_parts(model), None, "tiny", None, False)


def build(base: Backbone, **values: Any) -> Adapted:
    return build_adapters(base, AdapterSection.model_validate(VALUES | values), seed=0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs("llava", batch=2)).logits


def shaken(adapted: Adapted) -> Adapted:
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in adapted.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=source))
    return adapted


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_60", "olora"])
def test_weight_starts_are_those_of_peft_and_leave_the_base_alone(kind: str, rslora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = logits(tiny_vlm("llava")[0])
    base = backbone()
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    adapted = build(base, init_lora_weights=kind, use_rslora=rslora)
    ours = lora_layers(adapted.model)
    config = copy.deepcopy(adapted.model.peft_config["default"])
    config.init_lora_weights = kind
    theirs = lora_layers(
        get_peft_model(
            tiny_vlm("llava")[0],
            LoraConfig(
                **{
                    name: getattr(config, name)
                    for name in (
                        "r",
                        "lora_alpha",
                        "use_rslora",
                        "target_modules",
                        "rank_pattern",
                        "alpha_pattern",
                        "init_lora_weights",
                    )
                }
            ),
        )
    )
    for name, layer in theirs.items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        found = ours[name].lora_B["default"].weight @ ours[name].lora_A["default"].weight
        if "niter" in kind:  # from other draws: another subspace of a flat spectrum, which holds as much of W
            assert found.norm().item() == pytest.approx(product.norm().item(), rel=0.02), name
        else:  # singular vectors have no sign, so products are compared
            assert torch.dist(found, product) <= 1e-5 * product.norm(), name
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in adapted.model.state_dict().items()
        if "lora_" not in name
    }
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    assert torch.allclose(logits(adapted.model), plain, atol=1e-5)  # B A - B0 A0 is zero but for rounding
    assert not [name for name in adapted.trainable() if f".{START}." in name]
    wanted = logits(shaken(adapted).model)
    with adapted.model.disable_adapter():
        assert torch.equal(logits(adapted.model), plain)
    save_adapter(adapted, tmp_path / "a", base_name="tiny", base_fingerprint={}, recipe_digest="")
    stored = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert stored["r"] == 8 and list(stored["rank_pattern"].values()) == [4]
    assert not stored["use_rslora"] and stored["init_lora_weights"] is True
    again = load_adapter(backbone(), tmp_path / "a")
    assert set(again.peft_config) == {"default"}
    assert torch.allclose(logits(again), wanted, atol=1e-5)
    assert (wanted - plain).abs().max() > 0.01


def test_a_weight_start_is_the_same_at_every_build() -> None:
    one, two = (build(backbone(), init_lora_weights="pissa_niter_4").trainable() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_rank_that_a_weight_does_not_have() -> None:
    with pytest.raises(AdapterError, match="has no part of rank 80"):
        build(backbone(), init_lora_weights="pissa", lora_rank=80)


def test_eva_is_the_main_directions_of_the_inputs() -> None:
    base = backbone()
    inputs = tiny_inputs("llava", batch=2)
    inputs["attention_mask"][1, -6:] = 0
    seen: list[torch.Tensor] = []
    layer = "model.language_model.layers.0.self_attn.q_proj"
    hook = base.model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        base.model(**inputs)
    hook.remove()
    adapted = build_adapters(
        base, AdapterSection.model_validate(VALUES | {"init_lora_weights": "eva"}), seed=0, calibration=[inputs]
    )
    rows = seen[0][inputs["attention_mask"].bool()]
    wanted = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
    found = lora_layers(adapted.model)[layer].lora_A["default"].weight
    assert torch.linalg.svdvals(found @ wanted.T).min() > 0.999  # the same subspace
    assert lora_layers(adapted.model)["model.multi_modal_projector.linear_1"].r["default"] == 2
    assert adapted.model.peft_config["default"].init_lora_weights is True
    assert torch.equal(logits(adapted.model), logits(backbone().model))
    with pytest.raises(AdapterError, match="no batches were given"):
        build(backbone(), init_lora_weights="eva")
    with pytest.raises(AdapterError, match="directions for"):
        build_adapters(
            backbone(),
            AdapterSection(init_lora_weights="eva", lora_rank=70),
            seed=0,
            calibration=[tiny_inputs("llava")],
        )


def test_loftq_starts_at_the_error_of_quantization(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "base", "llava")
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    whole = load_backbone(section).model
    packed = load_backbone(section, QuantizationSection(load_in_4bit=True, bnb_4bit_compute_dtype="float32"))
    names = quantized_names(packed.model)
    adapted = build_adapters(packed, AdapterSection(lora_rank=8, lora_alpha=4.0, init_lora_weights="loftq"), seed=0)
    layers = lora_layers(adapted.model)
    assert names and set(names) <= set(layers)
    for name, layer in layers.items():
        # the base is read in bfloat16, as training sees it; that rounding is far below the error of four bits
        error = whole.get_submodule(name).weight.to(torch.bfloat16).float() - matrix(layer)
        start = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = torch.linalg.svdvals(error)[8:].norm()  # Eckart & Young
        assert torch.isclose(torch.dist(error, start), best, rtol=1e-3), name
    with pytest.raises(AdapterError, match="no targeted layer is quantized"):
        build(backbone(), init_lora_weights="loftq")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_weight_starts_on_a_quantized_base(kind: str, tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "base", "llava")
    section = ModelSection(name_or_path=str(folder), dtype="float32")
    quantization = QuantizationSection(load_in_4bit=True, bnb_4bit_compute_dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = logits(load_backbone(section, quantization).model)
        adapted = build_adapters(
            load_backbone(section, quantization), AdapterSection(lora_rank=4, init_lora_weights=kind), seed=0
        )
    assert torch.allclose(logits(adapted.model), plain, atol=1e-5)
    wanted = logits(shaken(adapted).model)
    save_adapter(adapted, tmp_path / "a", base_name="tiny", base_fingerprint={}, recipe_digest="")
    (tmp_path / "a" / "mmft_adapter.json").unlink()
    again = load_adapter(load_backbone(section, quantization), tmp_path / "a")
    assert torch.allclose(logits(again), wanted, atol=1e-5)


def test_loraplus_lets_b_learn_faster() -> None:
    from mmft.engine.optim import build_optimizer
    from mmft.recipe.schema import TrainSection

    adapted = build(backbone(), loraplus_lr_ratio=16.0, parts={"projector": {"learning_rate": 1e-3}})
    params = adapted.trainable()
    optimizer = build_optimizer(adapted, TrainSection(learning_rate=1e-4), params)
    rates = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(params)
    for name, value in params.items():
        rate = (1e-3 if "projector" in name else 1e-4) * (16.0 if ".lora_B." in name else 1.0)
        assert rates[id(value)] == pytest.approx(rate, rel=1e-12), name
