"""Frozen towers and frozen first layers: one forward, no graph, no backward, with checkpointing too."""

from __future__ import annotations

import pytest
import torch

from mmft.adapters.build import set_modes
from mmft.engine.memory import checkpoint_layers
from mmft.fast.no_graph import frozen_parameters
from mmft.recipe.schema import AdapterSection
from tests.fast.small import both, loss_and_gradients, small_setting

KINDS = ("llava", "smolvlm", "qwen2_vl", "mllama")


def counted(setting, names):
    """name -> [forwards, outputs with a graph, backwards] of some layers, in one training step."""
    calls = {name: [0, 0, 0] for name in names}
    layers = dict(setting.adapted.backbone.model.named_modules())

    def forward(name):
        def hook(module, args, out):
            calls[name][0] += 1
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad:
                calls[name][1] += 1
                out.register_hook(lambda grad: calls[name].__setitem__(2, calls[name][2] + 1))

        return hook

    handles = [layers[name].register_forward_hook(forward(name)) for name in names]
    plain, _, _ = both(setting, "head_rows")
    loss_and_gradients(plain, setting, range(2))
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_tower_runs_once_without_a_graph(tmp_path, kind, recompute, monkeypatch):
    setting = small_setting(tmp_path, kind)
    if recompute:
        layers = checkpoint_layers(setting.adapted)

        def modes(adapted):
            set_modes(adapted)
            for layer in layers:
                layer.training = True

        monkeypatch.setattr("tests.fast.small.set_modes", modes)
    parts = setting.adapted.backbone.parts
    tower = [*parts.linears("vision"), *parts.linears("projector")]
    assert tower
    calls = counted(setting, tower)
    assert all(found[1:] == [0, 0] for found in calls.values()), calls
    assert all(found[0] <= 1 for name, found in calls.items()), calls
    trained = [name for name in parts.linears("language", "mlp") if ".up_proj" in name or ".fc1" in name]
    seen = counted(setting, [f"{name}" for name in trained[-1:]])
    assert [found[0] for found in seen.values()] == [1 + recompute]
    assert all(found[2] for found in seen.values()), "a trained layer has a backward: the hooks see it"


def test_upstream_checkpointing_would_run_the_tower_backwards(tmp_path):
    """What the counts above guard against (the input hooks on every embedding)."""
    setting = small_setting(tmp_path, "llava")
    setting.adapted.model.enable_input_require_grads()
    tower = setting.adapted.backbone.parts.linears("vision", "mlp")
    assert all(found[1] and found[2] for found in counted(setting, tower[:1]).values())


def test_frozen_first_layers_keep_no_graph(tmp_path):
    setting = small_setting(tmp_path, adapter=AdapterSection(lora_rank=4, layers="last:1"))
    first = [name for name in setting.adapted.backbone.parts.linears("language") if ".layers.0." in name]
    assert first
    assert all(found == [1, 0, 0] for found in counted(setting, first).values())


@pytest.mark.parametrize(
    ("targets", "parts"),
    [(("language",), {"vision", "projector"}), (("language", "projector"), {"vision"}), (("vision",), set())],
)
def test_the_plan_counts_what_lies_before_the_first_trained_weight(tmp_path, targets, parts):
    setting = small_setting(tmp_path, adapter=AdapterSection(lora_rank=4, targets=targets))
    free, total = frozen_parameters(setting)
    home = setting.adapted.backbone.parts.part_of
    sizes = [(home(n), v.numel()) for n, v in setting.adapted.backbone.model.named_parameters() if "lora_" not in n]
    assert free == sum(size for part, size in sizes if part in parts) < total
    assert isinstance(free, int) and torch.is_grad_enabled()
