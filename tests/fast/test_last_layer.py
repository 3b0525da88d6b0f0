"""The last layer on supervised rows: loss and gradients of the whole layer, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmft.data.render import IGNORED
from mmft.fast import last_layer
from mmft.fast.last_layer import CANDIDATE, Rows, holds, layers_of, on_rows, row_wise, target_rows
from mmft.fast.plan import NotHere
from tests.fast.helpers import batches, distance, gradients, put_in, workplace


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_stay(tmp_path, checkpointing):
    engine, setting, work = workplace(tmp_path)
    if checkpointing:
        engine.job.adapted.backbone.model.train()
        from mmft.engine.memory import checkpoint_layers

        for layer in checkpoint_layers(setting.adapted):
            layer.training = True
    (batch,) = batches(engine)
    wanted = gradients(work, batch)
    fast = put_in(setting, work, CANDIDATE)
    found = gradients(fast, fast.prepare(batch))
    assert found[0] == pytest.approx(wanted[0], rel=1e-6) and distance(found[1], wanted[1]) < 1e-6  # float32's rounding
    fast.release()
    assert gradients(work, batch)[0] == wanted[0]


def test_the_modules_see_supervised_rows_only(tmp_path):
    engine, setting, work = workplace(tmp_path)
    (batch,) = batches(engine)
    fast = put_in(setting, work, CANDIDATE)
    seen: dict[str, tuple[int, ...]] = {}
    modules = row_wise(layers_of(setting)[-1])
    assert len(modules) == 2
    for module in modules:
        module.register_forward_pre_hook(lambda one, args: seen.update({type(one).__name__: tuple(args[0].shape)}))
    gradients(fast, fast.prepare(batch))
    wide = int(target_rows(batch.labels).sum())
    assert len(seen) == 2 and all(shape[:2] == (1, wide) for shape in seen.values())
    with torch.no_grad():
        fast.objective.loss(fast.adapted.model, fast.prepare(batch))
    assert all(shape[:2] == tuple(batch.labels.shape) for shape in seen.values())  # nothing is cut without gradients


def test_a_batch_without_a_target_is_computed_whole():
    module, rows = nn.Linear(3, 2), Rows()
    on_rows(module, rows)
    x = torch.randn(2, 4, 3)
    rows.take(torch.zeros(2, 4, dtype=torch.bool))
    whole = module(x)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    rows.take(mask)
    part = module(x)
    assert torch.equal(part[mask], whole[mask]) and not part[~mask].any()
    assert torch.equal(module(x[:1]), whole[:1])  # states of something else


def test_target_rows_stand_before_their_targets():
    labels = torch.tensor([[IGNORED, 5, IGNORED, 7], [IGNORED, IGNORED, IGNORED, 1]])
    assert target_rows(labels).tolist() == [[True, False, True, False], [False, False, True, False]]


def test_a_layer_that_is_not_the_last_is_refused(tmp_path, monkeypatch):
    _, setting, work = workplace(tmp_path)
    layers = layers_of(setting)
    assert len(layers) > 1
    monkeypatch.setattr(last_layer, "layers_of", lambda _: [*layers[1:], layers[0]])
    with pytest.raises(NotHere, match="not called once, as the last layer"):
        CANDIDATE.install(setting, work)
    assert not any(one._forward_hooks for one in row_wise(layers[0]))


def test_dropout_is_refused(tmp_path):
    _, setting, work = workplace(tmp_path)
    layer = layers_of(setting)[-1]
    lora = next(one for one in layer.mlp.modules() if hasattr(one, "lora_dropout"))
    lora.lora_dropout["default"] = nn.Dropout(0.1)
    with pytest.raises(NotHere, match="dropout is active"):
        CANDIDATE.install(setting, work)
    adapter = setting.recipe.adapter.model_copy(update={"lora_dropout": 0.1})
    assert not holds(replace(setting, recipe=setting.recipe.model_copy(update={"adapter": adapter})))[0]


def test_other_objectives_are_left_alone(tmp_path):
    _, setting, _ = workplace(tmp_path)
    assert holds(setting)[0]
    assert not holds(replace(setting, custom=True))[0]
    other = setting.recipe.model_copy(update={"objective": setting.recipe.objective.model_copy(update={"name": "dpo"})})
    assert not holds(replace(setting, recipe=other))[0]
