"""`mmft plan --probe`: the memory of a run as estimated, and as one step on its largest real forward takes it.

The model is loaded and the fast path put in as in a run; the forward with the most tokens goes through once, forward
and backward (objectives that make a step's gradients themselves make one), and no weight moves. `measured` is the peak
of that with the optimizer's moments, which a run holds beside it. Price: loading, the lengths of all rows, a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mmft.adapters.build import build_adapters
from mmft.backbones.load import Backbone, load_backbone
from mmft.data.collate import Batch
from mmft.data.preference_render import PreferenceBatch
from mmft.data.prompts import PromptBatch
from mmft.data.steps import plan_steps
from mmft.data.streaming import Streamed
from mmft.engine.budget import kept_products, largest_batch, plan_memory, probe, sizes_of, step_of
from mmft.engine.job import TrainJob
from mmft.engine.memory import recomputable
from mmft.engine.step_memory import StepSizes, held
from mmft.errors import RecipeError
from mmft.fast.kernel_caches import give_back
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import Setting, Work
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.base import Datasets
from mmft.objectives.online.base import OnlineObjective
from mmft.objectives.online.rollout import Attempt, Judge, Judged
from mmft.objectives.online.sampling import runs_tower_once
from mmft.recipe.schema import Recipe
from mmft.stages import calibration, load_datasets


def probe_memory(recipe: Recipe) -> dict[str, Any]:
    """Bytes: `parts` of the estimate, `estimate` (None where the kind of run has none), `measured`, how far they are
    apart as a share of it (`difference`); the `rows` that went through and the layers that were `recomputed`.

    Raises RecipeError for streamed rows, whose largest forward is not known, and for a step that does not fit.
    """
    kind, device = kind_of(recipe), PartialState().device
    with tempfile.TemporaryDirectory() as scratch:  # a kind that composes its base writes it there
        backbone = load_backbone(kind.base(recipe, Path(scratch)), recipe.quantization, device=device)
        datasets = load_datasets(recipe, backbone.processor, Journal(None, quiet=True))
        if isinstance(datasets.train, Streamed):
            raise RecipeError(
                "the largest forward of streamed rows is not known before they come",
                where="data.train[].streaming",
                do="plan without --probe, or take streaming out",
            )
        seen = calibration(recipe, backbone, datasets)
        adapted = build_adapters(backbone, recipe.adapter, seed=recipe.train.seed, calibration=seen)
        adapted = kind.adapt(adapted, recipe)
        steps, total = plan_steps(recipe, datasets.train, 1)
        setting = Setting(recipe, adapted, datasets.renderer, datasets.train, steps=steps)
        work = Work(adapted, kind.objective(recipe, adapted, datasets), datasets.renderer, steps=steps)
        fast, work = install(fast_plan(setting), setting, work)
        give_back()
        try:
            job = TrainJob(
                adapted=work.adapted,
                objective=work.objective,
                samples=datasets.train,
                eval_samples=[],
                renderer=work.renderer,
                plan=work.steps or steps,
                total_steps=total,
                eval_batch_size=1,
                section=recipe.train,
                folder=Path(scratch),
                identity={},
                prepare=work.prepare,
            )
            return _probed(recipe, job, backbone, datasets, fast=fast.on("lora_fused"), device=device)
        finally:
            work.release()


def _probed(
    recipe: Recipe, job: TrainJob, backbone: Backbone, datasets: Datasets, *, fast: bool, device: torch.device
) -> dict[str, Any]:
    budget = recipe.train.memory_budget
    planned = None
    if recipe.objective.name == "sft":
        planned = plan_memory(job, fast=fast, budget=budget, world=1, device=device)
    batch = largest_batch(job)
    if isinstance(job.objective, OnlineObjective):
        job.objective.judge = _Unlike(job.objective.judge)
    layers = recomputable(job.adapted) if recipe.train.gradient_checkpointing or budget is not None else []
    count = len(layers) if planned is None else planned.recomputed
    if planned is None:
        own = _of_answers(recipe, job, batch, fast=fast, count=count)
        parts = _held(job, fast=fast) | (_of_kind(recipe, job, backbone, datasets, batch) if own is None else own)
    else:
        parts = planned.parts
    peak = planned.probed if planned is not None and planned.probed else probe(job, batch, count=count, device=device)
    if peak >= 1 << 62:
        raise RecipeError(
            "the memory ran out in the probe step",
            where=f"rows {', '.join(batch.ids[:8])}",
            do="lower train.per_device_train_batch_size, or set train.memory_budget",
        )
    measured = peak + parts["optimizer"]
    known = {"activations", "vision", "logits"} & parts.keys()
    estimate = sum(parts.values()) if known else None
    return {
        "parts": parts,
        "estimate": estimate,
        "measured": measured,
        "difference": None if estimate is None else (estimate - measured) / measured,
        "rows": list(batch.ids),
        "recomputed": count,
    }


class _Unlike:
    """A judge whose answers are all worth something else: a probe must learn from every group, as a run may."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.names = judge, judge.names

    def __call__(self, attempts: Sequence[Attempt]) -> Judged:
        judged = self.judge(attempts)
        return replace(judged, total=torch.arange(len(attempts)).to(judged.total))


def _of_answers(recipe: Recipe, job: TrainJob, batch: Batch, *, fast: bool, count: int) -> dict[str, int] | None:
    """The estimate from the layout that the renderer really chose for answers to one prompt, or from all that will be
    sampled; None for other rows. Their logits stay whole (the head is not computed in chunks), but for a reward, which
    needs one row of them or none."""
    if not isinstance(batch, (PreferenceBatch, PromptBatch)):
        return None
    config = job.adapted.backbone.model.config
    sizes = sizes_of(batch, config)
    if isinstance(batch, PromptBatch):
        k, longest = recipe.objective.num_generations, recipe.evaluate.max_new_tokens
        answers, width = len(batch.rows) * k, max(len(row.input_ids) for row in batch.rows) + longest
        seen = 1 if runs_tower_once(job.adapted.model) else k
        sizes = StepSizes((width,) * answers, answers * longest, sizes.patches * seen)
    step = step_of(job, sizes, fast=fast, recomputed=count)
    rows = sizes.supervised
    if recipe.objective.name == "reward":
        rows = len(batch.last) if recipe.objective.answer_weight and isinstance(batch, PreferenceBatch) else 0
    return {
        "activations": step.activations,
        "logits": 12 * rows * config.get_text_config().vocab_size,
        "vision": step.vision,
    }


def _held(job: TrainJob, *, fast: bool) -> dict[str, int]:
    """What every run holds."""
    trained = sum(value.numel() for value in job.adapted.trainable().values())
    return {
        "process": held(),
        "kernels": kept_products(job, fast=fast),
        "optimizer": 8 * trained,
        "gradients": 6 * trained,
    }


def _of_kind(recipe: Recipe, job: TrainJob, backbone: Backbone, datasets: Datasets, batch: Batch) -> dict[str, int]:
    """The kind's own estimate for the rows of this batch; {} where it has none."""
    kind, own = kind_of(recipe), set(batch.ids)
    trained = sum(value.numel() for value in job.adapted.trainable().values())
    lengths = kind.measure(datasets.renderer, [sample for sample in datasets.train if sample.id in own])
    return kind.memory(recipe, backbone, trainable=trained, lengths=lengths) or {}
