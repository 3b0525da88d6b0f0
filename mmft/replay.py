"""`mmft verify-fast`: real batches of a recipe on the plain and on the fast path, and how far loss and gradients part.

Each optimizer step's loss and gradients are taken at the start's weights (zero matrices of the adapters filled, so that
every gradient is one), with the same dropout seeds. In fp32 the two paths must agree to 1e-5 of the gradients' norm in
every step. In bf16 the fast path must be no further from the fp32 gradients (of the same rounded weights) than the
plain one is: the errors of both, relative to the fp32 gradients, are squared and summed over the steps, and the root of
their ratio may exceed 1 by what chance does.

The logarithm of the ratio of two root mean squares of k numbers each is about normal with a deviation of `1 / sqrt(k)`
(Fisher's z). A step's gradients are many numbers whose roundings hang together: over n steps the deviation is
`0.08 / sqrt(n)` on models of two narrow layers (as of 150 free numbers a step), and less on larger ones. A loss is one
number a step: `1 / sqrt(n - 2)`, whose tail is that of the F distribution for few steps too. Four deviations are
allowed: a path as good as the plain one is told off once in 30,000 times.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.adapters.build import Adapted, build_adapters, set_modes
from mmft.backbones.load import load_backbone
from mmft.data.loader import assemble
from mmft.data.steps import plan_steps
from mmft.engine.memory import checkpoint_layers
from mmft.errors import RecipeError
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import Setting, Work
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.objectives.base import StepObjective
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import Recipe
from mmft.seeds import fold
from mmft.stages import calibration, load_datasets

FP32 = 1e-5
DEVIATIONS, SPREAD = 4.0, 0.08
"""How many deviations chance is given, and the deviation of one step's ratio of gradient errors."""
_FILL = 0.02


@dataclass(frozen=True)
class _Replayed:
    """Loss (a mean) and gradients of every step, and seconds of the steps but the first."""

    losses: list[float]
    grads: list[Tensor]
    seconds: float
    on: tuple[str, ...]
    table: list[list[str]]


def verify_fast(
    recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, batches: int = 4
) -> dict[str, Any]:
    """Replay `batches` optimizer steps plain, with all optimisations, and with each of them alone.

    Returns `ok`, the plan, and for float32 and bfloat16 (where the recipe trains in it) a row for each path:
    relative differences of loss and gradients (fp32: the largest; bf16: root mean square over the steps), what is
    allowed, and seconds a step. Raises RecipeError for an objective that makes its
    gradients itself.
    """
    loaded = load_recipe(recipe, overrides)
    found: dict[str, Any] = {"name": loaded.name, "batches": batches, "precisions": {}}
    exact = _paths(_in_float32(loaded), batches, stored=getattr(torch, loaded.model.dtype))
    reference = exact["plain"]
    found["plan"] = exact["all"].table
    found["precisions"]["float32"] = {
        name: _row(_Apart.of(one, reference, max), _Apart(FP32, FP32), one, reference) for name, one in exact.items()
    }
    if loaded.train.bf16 or loaded.model.dtype != "float32":
        gc.collect()  # the float32 model goes before the other one comes
        half = _paths(loaded, batches)
        found["plan"] = half["all"].table
        allowed = chance(_Apart.of(half["plain"], reference, _rms), batches)
        found["precisions"]["bfloat16"] = {
            name: _row(_Apart.of(one, reference, _rms), allowed, one, half["plain"]) for name, one in half.items()
        }
    found["ok"] = all(row["ok"] for rows in found["precisions"].values() for row in rows.values())
    return found


def _in_float32(recipe: Recipe) -> Recipe:
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"dtype": "float32"}),
            "quantization": recipe.quantization.model_copy(update={"bnb_4bit_compute_dtype": "float32"}),
            "train": recipe.train.model_copy(update={"bf16": False}),
        }
    )


def _paths(recipe: Recipe, batches: int, *, stored: torch.dtype | None = None) -> dict[str, _Replayed]:
    """One model, loaded once: path -> what it gave. `stored`: the weights are rounded to this first, so that a float32
    reference is of the same function as the run in 16 bits, and their rounding no error that both paths share."""
    kind, quiet = kind_of(recipe), Journal(None, quiet=True)
    with tempfile.TemporaryDirectory() as scratch:  # a kind that composes its base writes it there
        backbone = load_backbone(kind.base(recipe, Path(scratch)), recipe.quantization)
        for value in backbone.model.parameters() if stored is not None else ():
            if value.is_floating_point():
                value.data = value.data.to(stored).to(value.dtype)
        datasets = load_datasets(recipe, backbone.processor, quiet)
        seen = calibration(recipe, backbone, datasets)
        adapted = build_adapters(backbone, recipe.adapter, seed=recipe.train.seed, calibration=seen)
        adapted = kind.adapt(adapted, recipe)
        _fill(adapted, recipe.train.seed)
        objective = kind.objective(recipe, adapted, datasets)
        if isinstance(objective, StepObjective):
            raise RecipeError(
                f"{recipe.objective.name} makes the gradients of a step itself",
                where="objective.name",
                do="verify a recipe of another objective",
            )
        steps, _ = plan_steps(recipe, datasets.train, 1)

        def replay(fast: bool | tuple[str, ...]) -> _Replayed:
            asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"fast": fast})})
            setting = Setting(asked, adapted, datasets.renderer, datasets.train, steps=steps)
            start = Work(adapted, objective, datasets.renderer, steps=steps)
            plan, work = install(fast_plan(setting), setting, start)
            try:
                losses, grads, seconds = _steps(asked, work, datasets.train, steps, batches)
            finally:
                work.release()
            on = tuple(row.name for row in plan.rows if row.on)
            return _Replayed(losses, grads, seconds, on, plan.table())

        found = {"plain": replay(False), "all": replay(True)}
        for name in found["all"].on:
            found[name] = replay((name,))
    return found


def _fill(adapted: Adapted, seed: int) -> None:
    """Matrices that start at zero would hide the gradients of what they are multiplied with."""
    for name, value in adapted.trainable().items():
        if value.dim() > 1 and not bool(value.any()):
            source = torch.Generator().manual_seed(fold(seed, "verify", name))
            value.data.copy_(_FILL * torch.randn(value.shape, generator=source))


def _steps(
    recipe: Recipe, work: Work, samples: Sequence[Any], steps: Any, batches: int
) -> tuple[list[float], list[Tensor], float]:
    """Loss, gradients and the mean seconds of the first `batches` optimizer steps; no weight moves."""
    adapted, dtype = work.adapted, work.adapted.backbone.model.dtype
    layers = checkpoint_layers(adapted) if recipe.train.gradient_checkpointing else []
    pad = 0 if hasattr(work.renderer, "assemble") else adapted.backbone.pad_token_id
    where = next(adapted.model.parameters()).device
    set_modes(adapted)
    for layer in layers:
        layer.training = True
    losses, grads, spent = [], [], []
    for step in range(batches):
        begin = time.perf_counter()
        total = count = 0.0
        adapted.model.zero_grad()
        for number, micro in enumerate((work.steps or steps).micro_batches(step, 0)):
            batch = assemble(work.renderer, [(samples[row], epoch) for row, epoch in micro.rows], pad_token_id=pad)
            inputs = {key: v.to(dtype) if v.is_floating_point() else v for key, v in batch.inputs.items()}
            torch.manual_seed(fold(recipe.train.seed, "dropout", step, number))
            with torch.autocast(where.type, dtype=torch.bfloat16, enabled=recipe.train.bf16):
                placed = work.prepare(replace(batch, inputs=inputs).to(where))
                loss = work.objective.loss(adapted.model, placed)
            loss.sum.backward()
            total, count = total + float(loss.sum.detach()), count + loss.count
        losses.append(total / max(count, 1))
        held = [value.grad for value in adapted.trainable().values() if value.grad is not None]
        grads.append(torch.cat([one.detach().float().flatten() for one in held]))
        spent.append(time.perf_counter() - begin)
    adapted.model.zero_grad()
    for layer in layers:
        layer.gradient_checkpointing = False  # type: ignore[assignment]
    return losses, grads, sum(spent[1:] or spent) / len(spent[1:] or spent)


@dataclass(frozen=True)
class _Apart:
    """Relative differences of losses and of gradients: of a path, or those that are allowed."""

    loss: float
    gradients: float

    @classmethod
    def of(cls, one: _Replayed, other: _Replayed, over: Callable[[Sequence[float]], float]) -> _Apart:
        """Of one path from another, `over` the steps."""
        losses = [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(one.losses, other.losses, strict=True)]
        pairs = zip(one.grads, other.grads, strict=True)
        return cls(over(losses), over([float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]))


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))


def chance(plain: _Apart, steps: int) -> _Apart:
    """What a path may be apart that is as good as the plain one, which is so far; see the head of this file."""
    gradients = plain.gradients * math.exp(DEVIATIONS * SPREAD / math.sqrt(steps))
    if steps <= 2:  # two losses do not tell their own noise
        return _Apart(max(FP32, gradients, plain.loss), gradients)
    return _Apart(max(FP32, plain.loss * math.exp(DEVIATIONS / math.sqrt(steps - 2))), gradients)


def _row(apart: _Apart, allowed: _Apart, one: _Replayed, plain: _Replayed) -> dict[str, Any]:
    """Differences from the reference; `seconds` a step and `speedup` over the plain path of the same precision."""
    return {
        "loss": apart.loss,
        "allowed_loss": allowed.loss,
        "gradients": apart.gradients,
        "allowed": allowed.gradients,
        "ok": apart.gradients <= allowed.gradients and apart.loss <= allowed.loss,
        "seconds": one.seconds,
        "speedup": plain.seconds / max(one.seconds, 1e-9),
        "on": list(one.on),
    }
