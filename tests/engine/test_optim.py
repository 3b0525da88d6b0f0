"""Schedule against transformers' own, groups against their definition."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from mmft.adapters.build import build_adapters
from mmft.engine.optim import Masters, build_optimizer, lr_scale, set_learning_rate
from mmft.recipe.schema import AdapterSection, PartAdapter, TrainSection
from tests.engine.runs import tiny_backbone


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_equals_transformers(kind: str) -> None:
    total, warmup = 40, 8
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = get_linear_schedule_with_warmup if kind == "linear" else get_cosine_schedule_with_warmup
    schedule = make(optimizer, warmup, total)
    for step in range(total):
        # transformers starts its warm-up at 0; ours makes the first update count, so it is one step ahead there.
        expected = (step + 1) / warmup if step < warmup else schedule.get_last_lr()[0]
        assert lr_scale(step, total=total, warmup_ratio=warmup / total, kind=kind) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_constant_and_no_warmup() -> None:
    assert [lr_scale(s, total=3, warmup_ratio=0.0, kind="constant") for s in range(3)] == [1.0, 1.0, 1.0]
    assert lr_scale(0, total=10, warmup_ratio=0.0, kind="linear") == 1.0


def test_groups_by_part_and_decay(tmp_path) -> None:
    backbone = tiny_backbone(tmp_path)
    section = AdapterSection(
        targets=("language.attention", "projector"),
        parts={"projector": PartAdapter(mode="full", learning_rate=1e-3)},
    )
    adapted = build_adapters(backbone, section, seed=0)
    optimizer = build_optimizer(adapted, TrainSection(learning_rate=2e-4, weight_decay=0.1), adapted.trainable())
    seen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert seen == {id(p) for p in adapted.trainable().values()}
    for group in optimizer.param_groups:
        assert group["lr"] == (1e-3 if group["part"] == "projector" else 2e-4)
        for param in group["params"]:
            assert group["weight_decay"] == (0.1 if param.ndim >= 2 else 0.0)
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 1e-4}


def test_bfloat16_weights_learn_through_float32_masters() -> None:
    """Updates of 1e-4 on weights of 1.0 are below bfloat16's spacing there (2^-8): without masters nothing moves."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    masters = Masters({"w": param})
    optimizer = torch.optim.AdamW(masters.weights.values(), lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        masters.take_gradients()
        assert param.grad is None
        optimizer.step()
        masters.give_weights()
    # AdamW moves by lr a step under a constant gradient: 100 * 1e-4 = 0.01.
    torch.testing.assert_close(masters.weights["w"].detach(), torch.full((4,), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(param.detach(), torch.full((4,), 0.99).bfloat16())


def test_float32_weights_are_their_own_masters() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    assert Masters({"w": param}).weights["w"] is param
