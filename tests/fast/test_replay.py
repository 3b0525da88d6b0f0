"""`mmft verify-fast`: equal paths pass with exit code 0, a path that is not is told and has exit code 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmft
from mmft import replay
from mmft.fast import feature_store, known, native_kernels
from mmft.fast.plan import Candidate, Setting, Work
from tests.runs import cli, model, rows, values, write_recipe

CHANGES = {"data.eval": [], "adapter.targets": ["language.attention"], "train.gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


def test_both_paths_of_a_recipe_agree(tmp_path):
    done = cli("verify-fast", write_recipe(tmp_path, CHANGES), "train.bf16=true", "--batches", 2, "--json")
    found = done.json()
    assert done.code == 0 and found["ok"], done.err
    assert set(found["precisions"]) == {"float32", "bfloat16"}
    exact = found["precisions"]["float32"]
    assert exact["plain"]["gradients"] == 0.0 and exact["plain"]["on"] == []
    assert {"head_rows", "feature_store"} <= set(exact["all"]["on"]) and exact["feature_store"]["on"] == [
        "feature_store"
    ]
    assert exact["all"]["gradients"] < 1e-5 and exact["all"]["loss"] < 1e-5
    half = found["precisions"]["bfloat16"]
    assert half["plain"]["gradients"] > 0 and half["all"]["gradients"] <= half["all"]["allowed"]
    assert half["all"]["allowed"] == pytest.approx(half["plain"]["gradients"] * math.exp(0.32 / math.sqrt(2)))
    text = cli("verify-fast", tmp_path / "recipe.yaml", "--batches", 1).out
    assert "feature_store" in text and "float32, 1 steps" in text and "bfloat16, " not in text


def test_a_path_that_parts_is_told(tmp_path, monkeypatch):
    def wrong(setting: Setting, work: Work) -> Work:
        def more(batch):
            batch.inputs["input_ids"][:, 0] = 10
            return batch

        return replace(work, prepare=more)

    broken = replace(feature_store.CANDIDATE, install=wrong)
    monkeypatch.setattr(known, "CANDIDATES", (broken,))
    done = cli("verify-fast", write_recipe(tmp_path, CHANGES), "--batches", 1)
    assert done.code == 1 and "NOT EQUAL" in done.out


# ---------------------------------------------------------------- bf16: what is noise and what is not

BF16 = {**CHANGES, "adapter.targets": ["language.attention", "language.mlp"], "adapter.lora_dropout": 0.0}
BF16 |= {"model.dtype": "bfloat16", "train.bf16": True, "export.merge": False}


def a_break(change: Callable[[Tensor], Tensor]) -> Candidate:
    """A path whose first language layer changes its output, in 16 bits only."""

    def wrong(setting: Setting, work: Work) -> Work:
        if not setting.recipe.train.bf16:
            return work
        layer = next(
            one for name, one in work.adapted.model.named_modules() if name.endswith("language_model.layers.0")
        )

        def more(_layer: object, _given: object, found: Any) -> Any:
            return (change(found[0]), *found[1:]) if isinstance(found, tuple) else change(found)

        return replace(work, undo=(*work.undo, layer.register_forward_hook(more).remove))

    return Candidate("broken", lambda _: (True, "a test"), lambda _: "", install=wrong)


@pytest.mark.parametrize(
    ("change", "good"),
    [
        pytest.param(lambda x: x.float().to(x.dtype), True, id="nothing"),
        pytest.param(lambda x: x + x * 2**-6, False, id="a 64th too much"),
        pytest.param(lambda x: x.to(torch.float8_e4m3fn).to(x.dtype), False, id="four bits too few"),
    ],
)
def test_a_small_break_in_16_bits_is_told(tmp_path, monkeypatch, change, good):
    monkeypatch.setattr(known, "CANDIDATES", (a_break(change),))
    found = mmft.verify_fast(write_recipe(tmp_path, BF16))
    half = found["precisions"]["bfloat16"]
    assert all(row["ok"] for row in found["precisions"]["float32"].values())
    assert half["plain"]["ok"] and half["broken"]["ok"] == found["ok"] == good
    # The model's file is in 32 bits: that its weights are rounded is no error of either path.
    assert 1e-3 < half["plain"]["gradients"] < 8e-3


def test_what_chance_is_given():
    """Ratios as noise draws them pass, at every number of steps; errors half as large again do not."""
    draw = torch.Generator().manual_seed(0)
    for steps in (4, 8, 16):
        noise = torch.randn(2, 4000, steps, generator=draw).square().mean(-1).sqrt()
        spread = (torch.randn(2, 4000, steps, 150, generator=draw) / 150**0.5).square().sum(-1).mean(-1).sqrt()
        for worse, least, most in ((1.0, 0.9995, 1.0), (1.5, 0.0, 0.01)):
            passed = [
                float(fast * worse) <= replay.chance(replay._Apart(1.0, float(plain)), steps).gradients
                for plain, fast in zip(*spread, strict=True)
            ]
            assert least <= sum(passed) / len(passed) <= most, (steps, worse)
        passed = [
            float(fast) <= replay.chance(replay._Apart(float(plain), 1.0), steps).loss
            for plain, fast in zip(*noise, strict=True)
        ]
        assert sum(passed) / len(passed) >= 0.9995, steps
    assert replay.chance(replay._Apart(0.0, 0.01), 1).loss == replay.chance(replay._Apart(0.0, 0.01), 1).gradients


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sound_paths_pass_whatever_the_seed(tmp_path, monkeypatch, dtype):
    """Twenty models, data sets and orders, every optimisation alone and all of them (bf16 throughout, or autocast)."""
    monkeypatch.setattr(native_kernels, "race", lambda *_: (2.0, 1.0))
    for seed in range(20):
        given = {"model.name_or_path": str(model("llava", seed)), "data.train": [{"path": str(rows(16, seed))}]}
        recipe = write_recipe(tmp_path, {**BF16, "model.dtype": dtype, "train.seed": seed, **given})
        half = mmft.verify_fast(recipe)["precisions"]["bfloat16"]
        assert len(half) > 8
        assert all(row["ok"] for row in half.values()), (seed, {n: row for n, row in half.items() if not row["ok"]})


def test_an_objective_with_steps_of_its_own_is_refused(tmp_path):
    from mmft.errors import MmftError

    recipe = values(tmp_path, {**CHANGES, "objective": {"name": "contrastive", "cache_features": False}})
    with pytest.raises(MmftError):
        mmft.verify_fast(recipe)
