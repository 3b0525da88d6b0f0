"""Kept states of a frozen tower for captions, joint and dual learning: the same loss and gradients, each picture is
encoded once, refused with the reason where it would not be exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmft
from mmft.adapters.build import build_adapters, set_modes
from mmft.backbones.load import load_backbone
from mmft.fast import kept_tower
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import Setting, Work
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.recipe.load import load_recipe
from mmft.stages import load_datasets
from tests.objectives import captioners, pairs
from tests.objectives.joints import tiny_joint
from tests.runs import read_lines

COLD = {"data.eval": [], "adapter.lora_dropout": 0.0, "objective.captions_per_image": 0}
RUN = {"data.eval": [], "export.merge": False, "train.save_steps": 0}
KINDS = ("bart", "gpt2", "trocr", "git", "blip", "florence2", "pix2struct")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


def made(values: dict[str, Any]) -> tuple[Setting, Work]:
    recipe = load_recipe(values)
    kind, backbone = kind_of(recipe), load_backbone(recipe.model)
    datasets = load_datasets(recipe, backbone.processor, Journal(None, quiet=True))
    adapted = kind.adapt(build_adapters(backbone, recipe.adapter, seed=0), recipe)
    work = Work(adapted, kind.objective(recipe, adapted, datasets), datasets.renderer)
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"fast": ("feature_store",)})})
    return Setting(asked, adapted, datasets.renderer, datasets.train), work


def step(setting: Setting, work: Work, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    set_modes(setting.adapted)
    setting.adapted.model.zero_grad()
    torch.manual_seed(0)
    loss = work.objective.loss(setting.adapted.model, work.renderer.assemble([(setting.samples[n], 0) for n in rows]))
    loss.sum.backward()
    found = [value.grad.flatten() for value in setting.adapted.trainable().values() if value.grad is not None]
    return loss.sum.detach(), torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_pixels(tmp_path, kind):
    """To the bit for a picture with one caption, where the tower's batch is one row without the store too."""
    setting, plain = made(captioners.values(tmp_path, {**COLD, "objective.captions_per_image": 1}, kind=kind))
    wants = [step(setting, plain, rows) for rows in (range(1), range(4))]
    plan, work = install(fast_plan(setting), setting, plain)
    row = next(row for row in plan.rows if row.name == "feature_store")
    assert row.on, row.reason
    for _ in range(2):
        (loss, grads), (more, all_grads) = (step(setting, work, rows) for rows in (range(1), range(4)))
        assert torch.equal(loss, wants[0][0]) and torch.equal(grads, wants[0][1])
        assert torch.allclose(more, wants[1][0], rtol=1e-5)
        assert float((all_grads - wants[1][1]).norm() / wants[1][1].norm()) < 1e-5
    work.release()
    assert torch.equal(step(setting, plain, range(4))[1], wants[1][1]), "the tower is as it was"


def test_each_picture_is_encoded_once_for_all_its_captions_and_runs(tmp_path):
    seen: list[int] = []
    for turn in range(2):
        setting, plain = made(captioners.values(tmp_path, COLD))
        _, tower = kept_tower.tower_of(setting)
        tower.embeddings.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
        plan, work = install(fast_plan(setting), setting, plain)
        assert plan.on("feature_store")
        captions = sum(len(sample.answers) for sample in setting.samples[:4])
        seen.clear()
        for _ in range(2):
            step(setting, work, range(4))
        assert seen == [] if turn else seen and set(seen) == {1} and len(seen) < 4 < captions
        work.release()
        step(setting, plain, range(4))
        assert seen[-1] == captions


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter.targets": ["vision.attention", "cross_attention"]}, "vision is trained"),
        ({"data.augmentation": {"horizontal_flip": 0.5}}, "data.augmentation changes"),
        ({}, ""),
    ],
)
def test_plan_tells_of_it_and_why_not(tmp_path, changes, reason):
    found = mmft.plan(captioners.values(tmp_path, {**COLD, **changes}))["fast"]
    row = next(row for row in found if row[0] == "feature_store")
    assert row[1] == ("off" if reason else "on") and reason in row[2], row


def test_a_tower_that_is_told_otherwise_is_found_at_the_start(tmp_path, monkeypatch):
    setting, plain = made(captioners.values(tmp_path, COLD))
    own = kept_tower.LockedTower._told
    monkeypatch.setattr(
        kept_tower.LockedTower, "_told", lambda self, out: {n: v * 1.01 for n, v in own(self, out).items()}
    )
    plan, work = install(fast_plan(setting), setting, plain)
    row = next(row for row in plan.rows if row.name == "feature_store")
    assert not row.on and "the loss with kept states differs" in row.reason and not work.undo
    assert "forward" not in kept_tower.tower_of(setting)[1].__dict__


JOINTS = {"joint": tiny_joint, "dual": tiny_joint}


@pytest.mark.parametrize("name", JOINTS)
def test_joint_and_dual_learning(tmp_path, name):
    changes = {
        "model.name_or_path": str(JOINTS[name]()),
        "adapter.targets": ["language.attention"],
        "adapter.lora_dropout": 0.0,
        "objective": {"name": name},
        "data.eval": [],
    }
    setting, plain = made(pairs.values(tmp_path, changes))
    want, grads = step(setting, plain, range(4))
    plan, work = install(fast_plan(setting), setting, plain)
    row = next(row for row in plan.rows if row.name == "feature_store")
    assert row.on, row.reason
    for _ in range(2):
        loss, found = step(setting, work, range(4))
        assert torch.allclose(loss, want, rtol=1e-5) and float((found - grads).norm() / grads.norm()) < 1e-5
    work.release()


def test_a_run_is_the_run_without(tmp_path):
    found = {}
    for fast in (False, ["feature_store"]):
        name = f"run-{bool(fast)}"
        mmft.train(captioners.values(tmp_path, {**RUN, "train.fast": fast, "name": name}), quiet=True)
        rows = read_lines(tmp_path / "runs" / name / "metrics.jsonl")
        found[bool(fast)] = [row["loss"] for row in rows if "loss" in row]
    assert len(found[True]) == 4 and found[True] == pytest.approx(found[False], rel=1e-4)
    assert list((tmp_path / "cache").rglob("*.slab"))
