"""Recomputed layers leave every gradient as it is; a budget asks for as few as fit; the estimate is near the peak."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mmft
from mmft.adapters.build import set_modes
from mmft.backbones.load import load_backbone
from mmft.data.steps import plan_steps
from mmft.engine import budget as budget_module
from mmft.engine.budget import plan_memory, sizes_of
from mmft.engine.memory import checkpoint_layers, recomputable
from mmft.engine.step_memory import (
    HEAP,
    KERNEL_HEAP,
    Peak,
    StepMemory,
    StepSizes,
    layers_asked,
    patches_of,
    step_memory,
)
from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import AdapterSection, ModelSection
from tests import runs
from tests.fast.small import batch_of, both, small_recipe, small_setting
from tests.runs import cli, read_lines, write_recipe


def _gradients(setting, work, count):
    """Gradients with `count` recomputed layers, and how often each layer ran."""
    layers = checkpoint_layers(setting.adapted, count) if count else []
    every = recomputable(setting.adapted)
    ran = [0] * len(every)

    def counting(place):
        return lambda *_: ran.__setitem__(place, ran[place] + 1)

    handles = [layer.self_attn.register_forward_pre_hook(counting(at)) for at, layer in enumerate(every)]
    set_modes(setting.adapted)
    for layer in layers:
        layer.training = True
    setting.adapted.model.zero_grad()
    work.objective.loss(setting.adapted.model, batch_of(work, setting, range(3))).sum.backward()
    for layer in layers:
        layer.gradient_checkpointing = False
    for handle in handles:
        handle.remove()
    return [value.grad.clone() for value in setting.adapted.trainable().values()], ran


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("fast", [False, True])
def test_gradients_are_equal_for_every_number_of_recomputed_layers(tmp_path, kind, fast):
    setting = small_setting(tmp_path, kind)
    setting = replace(setting, steps=plan_steps(setting.recipe, setting.samples, 1)[0])
    names = ("head_in_forward", "packing", "lora_fused", "norms_fused") if fast else ("head_rows",)
    _, _, work = both(setting, *names)
    total = len(recomputable(setting.adapted))
    wanted, ran = _gradients(setting, work, 0)
    assert ran == [1] * total and total >= 2
    for count in range(1, total + 1):
        found, ran = _gradients(setting, work, count)
        assert ran == [2] * count + [1] * (total - count)
        assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    work.release()


def test_frozen_first_layers_are_never_recomputed(tmp_path):
    setting = small_setting(tmp_path, adapter=AdapterSection(lora_rank=4, layers="last:1"))
    assert [id(one) for one in recomputable(setting.adapted)] == [id(checkpoint_layers(setting.adapted)[0])]
    first = setting.adapted.backbone.model.model.language_model.layers[0]
    assert not first.gradient_checkpointing
    before = small_setting(tmp_path / "p", adapter=AdapterSection(lora_rank=4, layers="last:1", modules_to_save=()))
    before.adapted.backbone.model.model.multi_modal_projector.linear_1.weight.requires_grad_(True)
    assert len(recomputable(before.adapted)) == 2  # a gradient now goes through all of them


@pytest.mark.parametrize(("budget", "layers"), [(10_000, 0), (1_900, 1), (1_700, 3), (1_200, 7), (10, 8)])
def test_a_budget_asks_for_as_few_layers_as_fit(budget, layers):
    step = StepMemory(activations=int(HEAP * 800), logits=60, vision=0)  # 8 layers of 100
    found = layers_asked(budget, step, rest=900, layers=8, thin=10)
    assert found == layers
    after = 900 + step.total - found * HEAP * (100 - 10)
    assert after <= budget or found == 8
    assert found == 0 or after + HEAP * (100 - 10) > budget


def _config(**more):
    text = SimpleNamespace(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        num_hidden_layers=6,
        **more,
    )
    vision = SimpleNamespace(hidden_size=32, intermediate_size=64, num_hidden_layers=2, patch_size=8)
    return SimpleNamespace(get_text_config=lambda: text, vision_config=vision)


def test_the_estimate_counts_layers_rows_and_patches():
    sizes = StepSizes((40, 60), 12, 32)
    fast = step_memory(_config(), sizes, fast=True)
    layer = 2 * 100 * (6 * 64 + 2 * 32 + 2 * 128) + 2 * 4 * (40**2 + 60**2)
    assert fast.activations == int(HEAP * 6 * layer) and fast.logits == 12 * 12 * 1000 and fast.vision == 0
    some = step_memory(_config(), sizes, fast=True, recomputed=4)
    assert some.activations == int(HEAP * (2 * layer + 4 * 2 * 100 * 64))
    every = step_memory(_config(), sizes, fast=True, recomputed=6)
    assert every.activations == int(HEAP * (layer + 6 * 2 * 100 * 64))
    assert step_memory(_config(), sizes, fast=False).activations > fast.activations
    assert step_memory(_config(), StepSizes((4,), 1, 10_000), fast=True).vision > 0  # pictures beyond the text
    assert step_memory(_config(), sizes, fast=True, towers=True).vision > 0


def test_float32_keeps_twice_the_bytes_and_autocast_its_copies_of_float32_weights(tmp_path):
    """Of shapes: every kept value has the width of what products take. Of a run: only where autocast has to cast."""
    sizes = StepSizes((40, 60), 12, 10_000)
    for fast in (True, False):
        half, whole = (step_memory(_config(), sizes, fast=fast, width=width) for width in (2, 4))
        assert whole.activations == pytest.approx(2 * half.activations, abs=2)
        assert whole.vision + whole.activations > half.vision + half.activations
    assert step_memory(_config(), sizes, fast=False, cast=5).activations == 5 + half.activations
    found = {}
    for dtype, bf16 in (("bfloat16", True), ("float32", True), ("float32", False)):
        changes = {"model.dtype": dtype, "train.bf16": bf16, "train.fast": False, **runs.TRAIN_ONLY}
        found[dtype, bf16] = mmft.plan(runs.values(tmp_path, changes), probe=True)["probe"]["parts"]["activations"]
    model = load_backbone(ModelSection(name_or_path=str(runs.model()))).model
    layers = sum(v.numel() for n, v in model.named_parameters() if "language_model.layers" in n and v.dim() > 1)
    cast = 2 * (layers + model.get_output_embeddings().weight.numel())
    assert found["float32", True] == found["bfloat16", True] + cast
    assert found["float32", False] == pytest.approx(2 * found["bfloat16", True], abs=2)
    assert patches_of(_config(), 2 * 3 * 8 * 8 * 5) == 10


def test_a_batch_is_measured_as_it_is_packed(tmp_path):
    setting = small_setting(tmp_path)
    setting = replace(setting, steps=plan_steps(setting.recipe, setting.samples, 1)[0])
    plain, _, packed = both(setting, "packing")
    config = setting.adapted.backbone.model.config
    alone = [batch_of(plain, setting, [row]).inputs["input_ids"].shape[1] for row in range(3)]
    assert sizes_of(batch_of(packed, setting, range(3)), config).rows[:2] == tuple(alone[:2])
    padded = sizes_of(batch_of(plain, setting, range(3)), config)
    assert padded.rows == (max(alone),) * 3 and padded.patches == 3 * 16
    packed.release()


def test_the_peak_sees_what_came_and_went():
    with Peak() as peak:
        begin = peak.bytes
        block = torch.ones(40_000_000)
        while peak.bytes < begin + 150_000_000:
            block += 1
        del block
    assert peak.bytes >= begin + 150_000_000


def test_probes_raise_the_layers_until_they_fit(tmp_path, monkeypatch):
    setting = small_setting(tmp_path, bf16=False)
    asked: list[int] = []

    def probe(job, batch, *, count, device):
        asked.append(count)
        return 10**9 - count * 10**8

    monkeypatch.setattr(budget_module, "probe", probe)
    plain, _, _ = both(setting, "head_rows")
    recipe = setting.recipe
    steps, total = plan_steps(recipe, setting.samples, 1)
    job = SimpleNamespace(
        adapted=setting.adapted,
        objective=plain.objective,
        samples=setting.samples,
        renderer=setting.renderer,
        plan=steps,
        total_steps=total,
        section=recipe.train,
        prepare=plain.prepare,
    )
    device = torch.device("cpu")
    assert plan_memory(job, fast=False, budget=None, world=1, device=device).recomputed == 0 and not asked
    found = plan_memory(job, fast=False, budget=500.0, world=1, device=device)
    assert (found.recomputed, asked) == (0, [0]) and found.probed == 10**9
    asked.clear()
    tight = plan_memory(job, fast=False, budget=0.001, world=1, device=device)
    assert tight.recomputed == len(recomputable(setting.adapted)) and asked[-1] == tight.recomputed
    assert plan_memory(job, fast=False, budget=0.001, world=2, device=device).probed is None


def test_a_budget_beside_full_recomputation_is_refused():
    for train in ({"memory_budget": 1.0, "gradient_checkpointing": True}, {"memory_budget": -1.0}):
        with pytest.raises(RecipeError, match="memory_budget"):
            small_recipe(**train)
    values = {"name": "x", "model": "shipped:nano-vlm", "data": {"train": "shipped:y"}, "train": {"memory_budget": 1.0}}
    with pytest.raises(RecipeError, match="only known for answers"):
        load_recipe({**values, "adapter": {"method": "prefix"}})


@pytest.mark.parametrize("budget", [None, 0.01])
def test_a_run_tells_its_memory(tmp_path, budget):
    train = {} if budget is None else {"train.memory_budget": budget}
    recipe = write_recipe(
        tmp_path, {"train.max_steps": 2, "evaluate.models": ["adapter"], "export.merge": False, **train}
    )
    done = cli("train", recipe, "--quiet")
    assert done.code == 0, done.err
    (run,) = [path for path in tmp_path.rglob("training.json") if "checkpoint" not in str(path)]
    memory = json.loads(run.read_text())["memory"]
    assert memory["recomputed_layers"] == (0 if budget is None else 2)
    assert 0.85 < memory["total"] / memory["peak"] < 1.15
    assert ("probe" in memory) == (budget is not None)
    events = [line for line in read_lines(run.parent / "events.jsonl") if "memory" in str(line)]
    assert events


def test_layers_of_our_own_kernels_leave_no_products_behind(tmp_path, monkeypatch):
    changes = {"model.dtype": "bfloat16", "train.bf16": True, "adapter.lora_dropout": 0.0, **runs.TRAIN_ONLY}
    found = {}
    for there in (False, True):
        monkeypatch.setattr(budget_module, "chosen", lambda there=there: object() if there else None)
        for fast in (False, True):
            made = mmft.plan(runs.values(tmp_path, {**changes, "train.fast": fast}), probe=True)["probe"]
            found[there, fast] = made["parts"]
    assert found[False, False] == {**found[True, False], "process": found[False, False]["process"]}
    assert found[True, True]["kernels"] == 0 < found[False, True]["kernels"] == found[True, False]["kernels"]
    ratio = found[True, True]["activations"] / found[False, True]["activations"]
    assert ratio == pytest.approx(KERNEL_HEAP / HEAP, rel=1e-4)
