"""What the tests of online RL share: tiny models, their rows as questions, an online objective on them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import load_backbone
from mmft.data.formats import load_all
from mmft.data.prompts import PromptBatch, PromptRenderer
from mmft.data.render import Renderer
from mmft.data.sample import Piece, Sample, Turn
from mmft.kinds.base import Datasets
from mmft.kinds.online import Online
from mmft.objectives.base import StepContext
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSection, DataSource, ModelSection, QuantizationSection, Recipe
from tests import runs


def changes(name: str = "grpo", **more: Any) -> dict[str, Any]:
    """What makes `runs.values` a recipe of online RL: 4 answers of up to 6 tokens, rewarded by format and length."""
    return {
        "objective": {"name": name, "rewards": {"format:.*[a-z].*": 1.0, "length": 0.5}, "num_generations": 4},
        "adapter": {"targets": runs.TARGETS, "lora_rank": 8},
        **more,
    }


def step(batch: PromptBatch, *, number: int = 0, update: int = 0) -> StepContext:
    """One process, no autocast."""
    return StepContext(float(batch.supervised), (0,), lambda one: one, nullcontext, number=number, update=update)


def samples(n: int = 4) -> list[Sample]:
    """Rows of one picture."""
    source = DataSource(path=str(runs.rows(16)))
    return load_all((source,), DataSection(train=(source,)), 0)[:n]


def with_two_pictures(rows: list[Sample]) -> list[Sample]:
    """The first row shows the second one's picture too, in front of its own."""
    first, other = rows[0], rows[1]
    asked = Turn("user", (Piece("image"), Piece("image"), Piece("text", "which?")))
    return [replace(first, turns=(asked, first.turns[-1]), media=(*other.media, *first.media)), *rows[1:]]


def tiny(recipe: Recipe, kind: str = "llava") -> tuple[Adapted, PromptRenderer]:
    """An adapted tiny model (adapters moved off their start, so that on and off differ) and its renderer."""
    section = ModelSection(name_or_path=str(runs.model(kind)), dtype="float32")
    backbone = load_backbone(section, QuantizationSection())
    adapted = Online().adapt(build_adapters(backbone, recipe.adapter, seed=0), recipe)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in adapted.trainable().values():
            value.add_(0.05 * torch.randn(value.shape, generator=source))
    return adapted, PromptRenderer(Renderer(backbone.processor, max_length=512), pad_token_id=backbone.pad_token_id)


def tried(folder: Any, name: str = "grpo", kind: str = "llava", **more: Any) -> tuple[Any, Adapted, PromptRenderer]:
    """(objective, adapted, renderer) of a tiny online recipe."""
    recipe = load_recipe(runs.values(folder, changes(name, **more)))
    adapted, renderer = tiny(recipe, kind)
    datasets = Datasets(samples(), {}, renderer, "")
    return Online().objective(recipe, adapted, datasets), adapted, renderer


def gradients(adapted: Adapted) -> dict[str, torch.Tensor]:
    """Those of all that is trained, taken away from it."""
    found = {}
    for name, value in adapted.trainable().items():
        found[name] = torch.zeros_like(value) if value.grad is None else value.grad.clone()
        value.grad = None
    return found
