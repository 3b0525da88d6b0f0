"""A tiny model with adapters, and what optimisations are put into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.fast.plan import Candidate, Setting, Work, fast_plan, install
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import AdapterSection
from tests.engine.runs import make_engine

WIDE = AdapterSection(targets=("language.attention", "language.mlp"), lora_rank=4)


def workplace(folder: Path, *, bf16: bool = False, **given: Any) -> tuple[Any, Setting, Work]:
    """(engine, setting, work) of a tiny run; B is random, so that every adapter counts."""
    engine, adapted = make_engine(folder, **{"adapter": WIDE, **given}, bf16=bf16)
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in adapted.trainable().items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=source) * 0.05)
    recipe = load_recipe(
        {"name": "x", "model": "shipped:nano-vlm", "data": {"train": "shipped:y"}, "train": {"bf16": bf16}}
    )
    job = engine.job
    return engine, Setting(recipe, adapted, job.renderer, job.samples), Work(adapted, job.objective, job.renderer)


def put_in(setting: Setting, work: Work, *candidates: Candidate) -> Work:
    """The work with optimisations in it; all of them have to hold."""
    plan, work = install(fast_plan(setting, candidates), setting, work, candidates)
    assert all(row.on for row in plan.rows), plan.table()
    return work


def batches(engine: Any, number: int = 1) -> list[Any]:
    """The first micro-batches of the run."""
    return [batch for _, step in zip(range(number), engine._steps(), strict=False) for batch in step][:number]


def gradients(work: Work, batch: Any, *, seed: int = 0, bf16: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch and the gradients of everything trained, in training mode."""
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = work.objective.loss(work.adapted.model, batch)
    (loss.sum / loss.count).backward()
    found = {}
    for name, value in work.adapted.trainable().items():
        assert value.grad is not None, name
        found[name], value.grad = value.grad.double(), None
    return float(loss.sum.detach()), found


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of gradients."""
    assert left.keys() == right.keys()
    apart = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return (apart / sum(float(value.square().sum()) for value in right.values())) ** 0.5


def names_and_values(model: Any, names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The state of a model, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
