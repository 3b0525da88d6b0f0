"""Experts, whole modules, layers; going on from an adapter; several adapters; AdaLoRA's ranks over a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmft.adapters.build import Adapted, build_adapters, set_modes
from mmft.adapters.store import load_adapter, load_adapters, save_adapter
from mmft.backbones.load import Backbone
from mmft.backbones.parts import find_parts
from mmft.engine.checkpoint import load_checkpoint, save_checkpoint
from mmft.engine.optim import build_optimizer
from mmft.engine.state import TrainState
from mmft.errors import AdapterError
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection, TrainSection
from tests.adapters.matrix import backbone as tiny_backbone
from tests.adapters.matrix import outputs
from tests.tiny import tiny_inputs, tiny_vlm

PROJECTOR: dict[str, Any] = {"targets": ["projector"], "lora_rank": 4, "oft_block_size": 8, "bottleneck_size": 8}


def backbone() -> Backbone:
    model = tiny_vlm("llava")[0]
    return Backbone(model, None, find_parts(model), None, "tiny", None, False)


def build(base: Backbone | None = None, **values: Any) -> Adapted:
    return build_adapters(base or backbone(), AdapterSection.model_validate(values), seed=0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs("llava", batch=2)).logits


def shaken(adapted: Adapted, seed: int = 3) -> Adapted:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapted.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=source))
    return adapted


def save(adapted: Adapted, folder: Path) -> Path:
    save_adapter(adapted, folder, base_name="tiny", base_fingerprint={}, recipe_digest="")
    return folder


def test_experts_get_lora_and_keep_it(tmp_path: Path) -> None:
    family = "qwen3_vl_moe"
    values = {"lora_rank": 2, "parts": {"language": {"lora_alpha": 3.0}}}
    adapted = build(tiny_backbone(family), **values)
    stacks = [name for target in adapted.targets for name in target.parameters]
    assert stacks and "experts" in stacks[0]
    trained = [name for name in adapted.trainable() if "experts" in name]
    assert len(trained) == 2 * len(stacks)
    plain = outputs(tiny_backbone(family).model, family)
    assert torch.allclose(outputs(adapted.model.eval(), family), plain, atol=1e-5)
    set_modes(shaken(adapted))
    outputs(adapted.model, family).square().mean().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in adapted.trainable().values())
    with torch.no_grad():
        wanted = outputs(adapted.model.eval(), family)
        again = load_adapter(tiny_backbone(family), save(adapted, tmp_path / "a"))
        assert torch.allclose(outputs(again, family), wanted, atol=1e-6)
    assert (wanted - plain).abs().max() > 1e-3


def test_modules_to_save_and_layers() -> None:
    adapted = build(layers="last:1", modules_to_save=["projector", "lm_head"])
    homes = {adapted.home(name)[0] for name in adapted.trainable()}
    assert homes == {"projector", "head", "language"}
    assert all(".layers.1." in name for name in adapted.trainable() if "lora_" in name)
    adapted = build(targets=["projector"], modules_to_save=["linear_1"])
    assert [row[:4] for row in adapted.table()] == [
        ["projector", "other", "full", "1"],
        ["projector", "other", "lora", "1"],
    ]
    with pytest.raises(AdapterError, match=r"'projector.other' is to get an adapter and to be trained whole"):
        build(targets=["projector"], modules_to_save=["projector"])


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("full", "prompt", "prefix", "ln_tuning")])
def test_going_on(method: str, tmp_path: Path) -> None:
    values = PROJECTOR | {"method": method}
    wanted = logits(shaken(first := build(**values)).model)
    second = build(**values, init_from=str(save(first, tmp_path / "a")))
    assert torch.allclose(logits(second.model), wanted, atol=1e-6)
    assert second.trainable().keys() == first.trainable().keys()


def test_going_on_from_another_adapter_says_what_differs(tmp_path: Path) -> None:
    folder = str(save(build(**PROJECTOR), tmp_path / "a"))
    for values, text in (
        ({"lora_rank": 8}, "has rank 4, and the recipe 8"),
        ({"lora_alpha": 1.0}, "has scaling"),
        ({"use_dora": True}, "has use_dora False, and the recipe True"),
        ({"method": "vera"}, "has type LORA, and the recipe VERA"),
        ({"targets": ["projector", "language.mlp"]}, "tensors are missing"),
    ):
        with pytest.raises(AdapterError, match=text):
            build(**(PROJECTOR | values), init_from=folder)


def test_several_adapters_on_one_model(tmp_path: Path) -> None:
    wanted = {}
    for seed, name in enumerate(("one", "two")):
        adapted = shaken(build(**PROJECTOR), seed)
        wanted[name] = logits(adapted.model)
        save(adapted, tmp_path / name)
    model = load_adapters(backbone(), {name: tmp_path / name for name in wanted})
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), wanted[name])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(backbone().model))
    with pytest.raises(AdapterError, match="which replace each other"):
        load_adapters(
            backbone(),
            {"a": tmp_path / "one", "b": save(build(method="bitfit", **{"targets": ["vision"]}), tmp_path / "bits")},
        )


def test_a_config_that_names_code_is_refused(tmp_path: Path) -> None:
    import json

    folder = save(build(**PROJECTOR), tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "megatron_config": {"x": 1}, "megatron_core": "os"}))
    with pytest.raises(AdapterError, match="runs no code for an adapter"):
        load_adapter(backbone(), folder)


def ada(steps: int, stop: int, folder: Path, *, resume: bool = False) -> Adapted:
    adapted = build(method="adalora", lora_rank=2, targets=["language.attention"])
    params = adapted.trainable()
    optimizer = build_optimizer(adapted, TrainSection(learning_rate=1e-2), params, total_steps=steps)
    begin = 0
    if resume:
        begin = load_checkpoint(folder / f"step-{stop:06d}", trainable=params, optimizer=optimizer).state.step
        stop = steps
    for step in range(begin, stop):
        set_modes(adapted)
        optimizer.zero_grad()
        (adapted.model(**tiny_inputs("llava", batch=2)).logits - 0.1 * step).square().mean().backward()
        optimizer.step()
    save_checkpoint(folder, trainable=params, optimizer=optimizer, state=TrainState(step=stop), identity={}, keep=9)
    return adapted


@pytest.mark.parametrize("stop", [3, 8])
def test_adalora_allocates_the_same_ranks_in_a_resumed_run(stop: int, tmp_path: Path) -> None:
    """Stopped while ranks are being taken away, and after they are final."""
    whole = ada(9, 9, tmp_path / "whole")
    ada(9, stop, tmp_path / "parts")
    resumed = ada(9, stop, tmp_path / "parts", resume=True)
    one, two = whole.trainable(), resumed.trainable()
    assert all(torch.equal(one[name], two[name]) for name in one)
    pattern = whole.model.peft_config["default"].rank_pattern
    assert pattern == resumed.model.peft_config["default"].rank_pattern
    kept = sum(sum(mask) for mask in pattern.values())
    assert kept == 2 * len(pattern) and sum(map(len, pattern.values())) == 3 * len(pattern)
    loaded = load_adapter(backbone(), save(whole, tmp_path / "a"))
    assert torch.allclose(logits(loaded), logits(whole.model), atol=1e-5)


def test_adalora_s_penalty_is_the_gradient_of_its_formula() -> None:
    from mmft.adapters.ranks import RankSchedule

    adapted = shaken(build(method="adalora", lora_rank=2, targets=["projector"]))
    params = {name: value for name, value in adapted.trainable().items() if "lora_E" not in name}
    norms = []
    for name, value in params.items():
        rows = value if "lora_A" in name else value.T
        norms.append(torch.linalg.norm(rows @ rows.T - torch.eye(len(rows))))
    wanted = torch.autograd.grad(0.5 * torch.stack(norms).mean(), list(params.values()))
    for value in params.values():
        value.grad = torch.zeros_like(value)
    RankSchedule(adapted.model, 10).add_penalty()
    for value, grad in zip(params.values(), wanted, strict=True):
        assert torch.allclose(value.grad, grad, atol=1e-6)
