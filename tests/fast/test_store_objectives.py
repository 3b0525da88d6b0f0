"""Features in the place of pixels under the other objectives that show pictures to a frozen tower: the same loss and
gradients, to the bit where the tower's batch is one row, and one encoding for all forwards of a step."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mmft
from mmft.adapters.build import Adapted, build_adapters, set_modes
from mmft.backbones.load import load_backbone
from mmft.data.loader import assemble
from mmft.data.preference_render import PreferenceRenderer
from mmft.fast.feature_store import Filled, holds
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import Setting, Work
from mmft.fast.stored import StoredRenderer, chat_of
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.objectives.base import StepContext, StepObjective
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import Recipe
from mmft.stages import load_datasets
from tests import runs
from tests.objectives.answers import preference_rows

PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "dpo, a kept reference": {"name": "dpo", "precompute_reference": True},
    "mdpo, cropped": {"name": "dpo", "image_weight": 0.5, "rejected_image": "crop"},
    "mdpo, other pictures": {"name": "dpo", "image_weight": 0.5, "rejected_image": "other"},
    "kto": {"name": "kto"},
    "orpo": {"name": "orpo"},
    "simpo": {"name": "simpo"},
    "cpo": {"name": "cpo"},
    "reward": {"name": "reward", "answer_weight": 0.5},
}
SAMPLED = {"rewards": {"format:.*[a-z].*": 1.0, "length": 0.5}, "kl_coef": 0.05, "num_iterations": 2}
ONLINE: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "num_generations": 3, **SAMPLED},
    "rloo": {"name": "rloo", "num_generations": 3, **SAMPLED},
    "ppo": {"name": "ppo", **SAMPLED},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


@dataclass
class Shop:
    """A tiny run before its first step, plain and with the store."""

    setting: Setting
    plain: Work
    stored: Work
    adapted: Adapted

    def batch(self, work: Work, rows: range) -> Any:
        pad = self.adapted.backbone.pad_token_id
        return assemble(work.renderer, [(self.setting.samples[row], 0) for row in rows], pad_token_id=pad)

    def step(self, work: Work, rows: range) -> tuple[float, Tensor]:
        """Loss and gradients of one step, as the engine makes them."""
        set_modes(self.adapted)
        batch, objective = self.batch(work, rows), work.objective
        for value in self.adapted.trainable().values():
            value.grad = None
        if isinstance(objective, StepObjective):
            context = StepContext(float(objective.count(batch)), (0,), work.prepare, nullcontext)
            loss = objective.backward(self.adapted.model, [batch], context)["loss"]
        else:
            found = objective.loss(self.adapted.model, work.prepare(batch))
            found.sum.backward()
            loss = float(found.sum.detach())
        grads = [value.grad.flatten() for value in self.adapted.trainable().values() if value.grad is not None]
        return loss, torch.cat(grads)


def a_recipe(folder: Path, objective: dict[str, Any], **changes: Any) -> Recipe:
    data: dict[str, Any] = {"data.eval": []}
    if objective["name"] not in {"grpo", "rloo", "ppo"}:
        rows = preference_rows(folder / "rows", 8)
        for path in rows.parent.glob("*.png"):  # of one colour a part of it would be the whole
            image = Image.open(path)
            image.putpixel((3, 3), (1, 2, 3))
            image.save(path)
        data["data.train"] = [{"path": str(rows)}]
    given = {"adapter": {"targets": ["language.attention"], "lora_rank": 4}, "objective": objective, **data, **changes}
    return load_recipe(runs.values(folder, given))


def shop(folder: Path, objective: dict[str, Any], kind: str = "llava", **changes: Any) -> Shop:
    recipe = a_recipe(folder, objective, **{"model.name_or_path": str(runs.model(kind)), **changes})
    own = kind_of(recipe)
    backbone = load_backbone(recipe.model, recipe.quantization)
    datasets = load_datasets(recipe, backbone.processor, Journal(None, quiet=True))
    adapted = own.adapt(build_adapters(backbone, recipe.adapter, seed=0), recipe)
    source = torch.Generator().manual_seed(1)
    for value in adapted.trainable().values():
        value.data.add_(0.05 * torch.randn(value.shape, generator=source))
    plain = Work(adapted, own.objective(recipe, adapted, datasets), datasets.renderer)
    asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"fast": ("feature_store",)})})
    setting = Setting(asked, adapted, datasets.renderer, datasets.train)
    plan, work = install(fast_plan(setting), setting, plain)
    assert plan.on("feature_store"), next(row.reason for row in plan.rows if row.name == "feature_store")
    return Shop(setting, plain, work, adapted)


def tower_of(adapted: Adapted) -> nn.Module:
    return next(m for n, m in adapted.backbone.model.named_modules() if n.endswith(("vision_tower", "vision_model")))


def counted(adapted: Adapted) -> list[int]:
    """Pictures of each forward of the tower from now on."""
    seen: list[int] = []
    tower_of(adapted).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", [*PREFERENCES, *ONLINE])
def test_loss_and_gradients_are_those_of_pixels(tmp_path, name):
    made = shop(tmp_path, {**PREFERENCES, **ONLINE}[name])
    want, grads = made.step(made.plain, range(1))
    for turn in ("empty", "full"):
        loss, found = made.step(made.stored, range(1))
        assert loss == want and torch.equal(found, grads), (turn, loss - want, float((found - grads).abs().max()))
    want, grads = made.step(made.plain, range(4))
    for turn in ("partly full", "full"):
        loss, found = made.step(made.stored, range(4))
        assert loss == pytest.approx(want, rel=1e-5, abs=1e-6), turn
        assert float((found - grads).norm() / grads.norm()) < 1e-5, turn


@pytest.mark.parametrize("name", [*PREFERENCES, *ONLINE])
def test_a_picture_is_encoded_once_for_all_forwards_and_then_never(tmp_path, name):
    made = shop(tmp_path, {**PREFERENCES, **ONLINE}[name])
    seen = counted(made.adapted)
    made.step(made.stored, range(4))
    cropped, other = 4 if name == "mdpo, cropped" else 0, name == "mdpo, other pictures"
    pictures = len({made.setting.samples[row].media for row in range(4)})
    assert sum(seen) == pictures + cropped or (other and sum(seen) > pictures)
    assert set(seen) == {1}, "each row alone"
    seen.clear()
    made.step(made.stored, range(4))
    assert sum(seen) == cropped
    made.step(made.plain, range(4))
    assert sum(seen) >= cropped + 4
    prepare, chat = made.stored.prepare, chat_of(made.stored.renderer)
    assert isinstance(prepare, Filled) and isinstance(chat, StoredRenderer)
    assert len(prepare.slabs) == pictures or other, "pictures that are seen once are not kept"
    assert type(chat_of(made.plain.renderer)) is not StoredRenderer, "evaluation goes the plain way"


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2_vl", "fast_vlm"])
@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_other_families(tmp_path, name, kind):
    made = shop(tmp_path, {**PREFERENCES, **ONLINE}[name], kind)
    want, grads = made.step(made.plain, range(1))
    for turn in ("empty", "full"):
        loss, found = made.step(made.stored, range(1))
        assert loss == pytest.approx(want, rel=1e-6, abs=1e-7), turn
        assert float((found - grads).norm() / grads.norm()) < 1e-6, turn


def test_answers_with_pictures_of_their_own(tmp_path):
    made = shop(tmp_path, {"name": "dpo"})
    first, second, *rest = made.setting.samples
    own = replace(first, candidates=(first.candidates[0], replace(first.candidates[1], media=second.media)))
    made.setting = replace(made.setting, samples=[own, *rest])
    want, grads = made.step(made.plain, range(1))
    for _ in range(2):
        loss, found = made.step(made.stored, range(1))
        assert loss == pytest.approx(want, rel=1e-6) and float((found - grads).norm() / grads.norm()) < 1e-6
    assert len(made.stored.prepare.slabs) == 2


def test_a_question_and_its_conversation_share_an_entry(tmp_path):
    """What a run of conversations kept serves a run that asks, and the other way round."""
    online = shop(tmp_path, ONLINE["grpo"])
    online.step(online.stored, range(4))
    pairs = shop(tmp_path, {"name": "sft"}, **{"data.train": online.setting.recipe.model_dump()["data"]["train"]})
    seen = counted(pairs.adapted)
    want = pairs.step(pairs.plain, range(1))
    seen.clear()
    found = pairs.step(pairs.stored, range(1))
    assert not seen and want[0] == found[0] and torch.equal(want[1], found[1])


@pytest.mark.parametrize("objective", [PREFERENCES["dpo"], PREFERENCES["reward"], ONLINE["grpo"]])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter.targets": ["language", "vision"]}, "vision is trained"),
        ({"adapter.targets": ["language", "projector"]}, "projector is trained"),
        ({"data.augmentation": {"horizontal_flip": 0.5}}, "data.augmentation changes the pictures"),
        ({"data.over_length": "shrink_images"}, "makes a picture's size depend on its question"),
    ],
)
def test_plan_tells_of_it_and_why_not(tmp_path, objective, changes, reason):
    plan = mmft.plan(a_recipe(tmp_path, objective).model_dump(mode="json", exclude_unset=True))
    row = next(row for row in plan["fast"] if row[0] == "feature_store")
    assert row[1] == "on" and "share one encoding" in row[3], row
    other = a_recipe(tmp_path, objective, **changes).model_dump(mode="json", exclude_unset=True)
    row = next(row for row in mmft.plan(other)["fast"] if row[0] == "feature_store")
    assert row[1] == "off" and reason in row[2], row


def test_a_sound_among_the_answers_says_why(tmp_path):
    made = shop(tmp_path, {"name": "dpo"})
    first = made.setting.samples[0]
    sound = replace(first.media[0], kind="audio")
    own = replace(first, candidates=(first.candidates[0], replace(first.candidates[1], media=(sound,))))
    assert "a row holds audio" in holds(replace(made.setting, samples=[own]))[1]

    class Own(PreferenceRenderer):
        pass

    chat = chat_of(made.plain.renderer)
    assert chat is not None and chat_of(Own(chat)) is chat


@pytest.mark.parametrize("name", ["dpo", "reward", "grpo", "ppo"])
def test_whole_runs_with_held_out_rows(tmp_path, name):
    """The run itself, evaluations while training included, against the same run without the store."""
    objective = {**PREFERENCES, **ONLINE}[name]
    found = {}
    for fast in (False, ["feature_store"]):
        recipe = a_recipe(
            tmp_path,
            objective,
            **{"train.max_steps": 3, "train.eval_steps": 1, "train.fast": fast, "export.merge": False},
        ).model_dump(mode="json", exclude_unset=True)
        held = preference_rows(tmp_path / "held", 4, seed=1) if name in PREFERENCES else runs.rows(4, 1)
        recipe["data"]["eval"] = [{"path": str(held), "name": "held"}]
        recipe["name"] = f"run-{bool(fast)}"
        mmft.train(recipe, quiet=True)
        lines = (tmp_path / "runs" / recipe["name"] / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[bool(fast)] = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
    assert len(found[True]) == len(found[False]) > 3
    assert found[True] == pytest.approx(found[False], rel=1e-4, abs=1e-5)
