"""A tiny model, rows and the two ways to train on them: plain, and with some optimisations put in."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import build_adapters, set_modes
from mmft.data.collate import Batch
from mmft.data.formats import load_all
from mmft.data.loader import assemble
from mmft.data.render import Renderer
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import FastPlan, Setting, Work
from mmft.objectives.build import build_sft
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import AdapterSection, DataSection, DataSource, ObjectiveSection, Recipe
from tests.engine.runs import tiny_backbone
from tests.tiny import tiny_rows


def small_recipe(**train: Any) -> Recipe:
    return load_recipe(
        {"name": "x", "model": "shipped:nano-vlm", "data": {"train": "shipped:y"}, "train": {"bf16": False, **train}}
    )


def small_setting(
    folder: Path, kind: str = "llava", *, rows: int = 8, adapter: AdapterSection | None = None, **train: Any
) -> Setting:
    """Rows of a colour each, LoRA whose B is not zero, everything in float32."""
    backbone = tiny_backbone(folder, kind)
    adapted = build_adapters(backbone, adapter or AdapterSection(lora_rank=4), seed=0)
    source = torch.Generator().manual_seed(0)
    for name, value in adapted.trainable().items():
        if "lora_B" in name:
            value.data.copy_(0.05 * torch.randn(value.shape, generator=source))
    data = folder / f"data-{rows}"
    if not data.exists():
        tiny_rows(data, rows)
    found = DataSource(path=str(data / "rows.jsonl"))
    samples = load_all((found,), DataSection(train=(found,)), 0)
    return Setting(small_recipe(**train), adapted, Renderer(backbone.processor, max_length=512), samples)


def both(setting: Setting, *names: str) -> tuple[Work, FastPlan, Work]:
    """(plain work, plan, work with the optimisations of these names)."""
    recipe = setting.recipe.model_copy(update={"train": setting.recipe.train.model_copy(update={"fast": names})})
    assert isinstance(setting.renderer, Renderer)
    objective = build_sft(ObjectiveSection(), setting.adapted.model)
    plain = Work(setting.adapted, objective, setting.renderer, steps=setting.steps)
    asked = replace(setting, recipe=recipe)
    plan, work = install(fast_plan(asked), asked, plain)
    return plain, plan, work


def batch_of(work: Work, setting: Setting, rows: Sequence[int]) -> Batch:
    """The batch as the model gets it."""
    pad = setting.adapted.backbone.pad_token_id
    return work.prepare(assemble(work.renderer, [(setting.samples[row], 0) for row in rows], pad_token_id=pad))


def loss_and_gradients(work: Work, setting: Setting, rows: Sequence[int]) -> tuple[float, torch.Tensor]:
    """Loss sum and all gradients of one batch, as a training step makes them."""
    set_modes(setting.adapted)
    setting.adapted.model.zero_grad()
    loss = work.objective.loss(setting.adapted.model, batch_of(work, setting, rows))
    loss.sum.backward()
    grads = [value.grad.flatten() for value in setting.adapted.trainable().values() if value.grad is not None]
    return float(loss.sum.detach()), torch.cat(grads)


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Relative distance."""
    return float((one - two).norm() / two.norm())


def copied(folder: Path, to: Path) -> Path:
    """A folder's copy."""
    return Path(shutil.copytree(folder, to))
