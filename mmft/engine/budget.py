"""The memory of a run before its first step: an estimate by owner at its largest forward, and under `memory_budget` as
few recomputed layers as fit, which a probe step on that forward's real rows confirms.

    planned = plan_memory(job, fast=True, budget=2.0, world=1, device=device)
    job = replace(job, recomputed=planned.recomputed)

Price: the lengths of all rows (no picture is opened but the largest forward's); with a budget one to three steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from mmft.adapters.build import set_modes
from mmft.data.collate import Batch
from mmft.data.lengths import lengths_of
from mmft.data.loader import assemble
from mmft.data.order import MicroBatch
from mmft.data.preference_render import PreferenceBatch
from mmft.data.streaming import Streamed
from mmft.engine.guards import memory_errors
from mmft.engine.job import TrainJob
from mmft.engine.memory import checkpoint_layers, recomputable
from mmft.engine.step_memory import (
    HEAP,
    KERNEL_HEAP,
    Peak,
    StepMemory,
    StepSizes,
    held,
    layers_asked,
    patches_of,
    step_memory,
)
from mmft.errors import MemoryLimitError, MmftError
from mmft.fast.kernel_caches import KEPT_BYTES, give_back
from mmft.fast.native_build import chosen
from mmft.journal import Journal
from mmft.objectives.base import StepContext, StepObjective

STEPS_LOOKED_AT = 2048
"""Steps among which the largest forward is looked for."""
PROBES = 3


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by owner; `recomputed` layers, and the peak of the probe with them (None where there was none)."""

    parts: dict[str, int]
    recomputed: int
    probed: int | None

    @property
    def total(self) -> int:
        """The estimate of the run's peak: the probe's and the optimizer's where there was a probe."""
        return sum(self.parts.values()) if self.probed is None else self.probed + self.parts["optimizer"]

    def to_json(self) -> dict[str, int]:
        """What the run's facts hold."""
        found = {**self.parts, "total": self.total, "recomputed_layers": self.recomputed}
        return found if self.probed is None else {**found, "probe": self.probed}


def with_memory(
    job: TrainJob, journal: Journal, accelerator: Accelerator, *, fast: bool
) -> tuple[TrainJob, MemoryPlan | None]:
    """The job with the layers that its budget has recomputed, and what it will need, told; None for objectives and
    streamed rows, whose forwards are not planned (a budget then recomputes every layer)."""
    budget, streamed = job.section.memory_budget, isinstance(job.samples, Streamed)
    if getattr(job.objective, "name", "") != "sft" or streamed:
        every = 0 if budget is None else len(recomputable(job.adapted))
        return replace(job, recomputed=every), None
    world, device = accelerator.num_processes, accelerator.device
    found = plan_memory(job, fast=fast, budget=budget, world=world, device=device)
    if found is None:
        return job, None
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found.parts.items() if size >= 5e6)
    journal.say(f"memory: {found.total / 1e9:.2f} GB expected ({parts})")
    if budget is not None:
        journal.say(f"{found.recomputed} language layers are computed again for a budget of {budget:g} GB")
        if found.total > budget * 1e9:
            journal.warn(f"a step needs {found.total / 1e9:.2f} GB, more than train.memory_budget gives it")
    return replace(job, recomputed=found.recomputed), found


def plan_memory(
    job: TrainJob, *, fast: bool, budget: float | None, world: int, device: torch.device
) -> MemoryPlan | None:
    """The plan of a run of answers; `budget` in GB. None where a forward of the run has no tokens to count.

    With several ranks the number of layers comes from the estimate alone, which is the same on all of them.
    """
    try:
        batch = largest_batch(job)
    except MmftError:  # a row that cannot be made: training meets it and names it
        return None
    if "input_ids" not in batch.inputs:
        return None
    sizes, layers = sizes_of(batch, job.adapted.backbone.model.config), len(recomputable(job.adapted))
    every = layers if job.section.gradient_checkpointing else 0
    step = step_of(job, sizes, fast=fast, recomputed=every)
    parts = _parts(job, step, now=held(), fast=fast)
    if budget is None:
        return MemoryPlan(parts, every, None)
    hidden = job.adapted.backbone.model.config.get_text_config().hidden_size
    limit, thin = int(budget * 1e9), width_of(job) * sum(sizes.rows) * hidden
    rest = sum(parts.values()) - step.total
    count = layers_asked(limit, step, rest=rest, layers=layers, thin=thin)
    peak = None
    for _ in range(PROBES if world == 1 else 0):
        peak = probe(job, batch, count=count, device=device)
        over = peak + parts["optimizer"] - limit
        if over <= 0 or count == layers:
            break
        one = max(step.activations // max(layers, 1), 1)
        count = min(layers, count + max(1, -(-over // one)))
    else:
        peak = None if world > 1 else probe(job, batch, count=count, device=device)
    return MemoryPlan(_parts(job, step_of(job, sizes, fast=fast, recomputed=count), now=held(), fast=fast), count, peak)


def step_of(job: TrainJob, sizes: StepSizes, *, fast: bool, recomputed: int) -> StepMemory:
    """The estimate of a forward and backward pass of these sizes with so many recomputed layers."""
    adapted = job.adapted
    towers = any(adapted.home(name)[0] in ("vision", "audio") for name in adapted.trainable())
    layers = len(recomputable(adapted)) or None
    config = adapted.backbone.model.config
    width, cast = width_of(job), 0 if fast else cast_bytes(job, recomputed)
    return step_memory(
        config,
        sizes,
        fast=fast,
        layers=layers,
        recomputed=recomputed,
        towers=towers,
        width=width,
        cast=cast,
        heap=KERNEL_HEAP if fast and chosen() is not None else HEAP,
        narrow=_by_kernels(job, fast=fast),
    )


def _by_kernels(job: TrainJob, *, fast: bool) -> bool:
    """Whether a step is computed by our own kernels throughout; one that samples leaves other products behind, and has
    logits whole."""
    return fast and chosen() is not None and not isinstance(job.objective, StepObjective)


def kept_products(job: TrainJob, *, fast: bool) -> int:
    """What torch keeps of its 16-bit products; of layers that our own kernels compute it has none."""
    own = torch.cuda.is_available() or _by_kernels(job, fast=fast)
    return KEPT_BYTES if job.section.bf16 and not own else 0


def width_of(job: TrainJob) -> int:
    """Bytes of a number that products take: autocast's, or the weights'."""
    return 2 if job.section.bf16 else job.adapted.backbone.model.dtype.itemsize


def cast_bytes(job: TrainJob, recomputed: int) -> int:
    """Frozen weights in float32 under autocast: each product keeps its 16-bit copy of one for its input's gradient."""
    model = job.adapted.backbone.model
    if not job.section.bf16 or model.dtype != torch.float32:
        return 0
    layers, head = recomputable(job.adapted), model.get_output_embeddings()
    frozen = [
        [value for value in layer.parameters() if value.dim() > 1 and not value.requires_grad] for layer in layers
    ]
    own = [sum(value.numel() for value in values) for values in frozen]
    return 2 * (sum(own[recomputed:]) + (0 if head is None else head.weight.numel()))


def _parts(job: TrainJob, step: StepMemory, *, now: int, fast: bool) -> dict[str, int]:
    """`process`: imports, rows, adapters and weights that no file backs, as they are held now."""
    trained = sum(value.numel() for value in job.adapted.trainable().values())
    return {
        "process": now,
        "kernels": kept_products(job, fast=fast),
        "optimizer": 8 * trained,  # two fp32 moments
        "gradients": 6 * trained,  # fp32, and the adapters in 16 bits
        "activations": step.activations,
        "logits": step.logits,
        "vision": step.vision,
    }


def largest_batch(job: TrainJob) -> Batch:
    """The forward with the most tokens, padding included, of real rows."""
    lengths = lengths_of(job.renderer, job.samples)
    packed = hasattr(job.renderer, "positions")
    micros = [
        micro
        for step in range(min(job.total_steps, STEPS_LOOKED_AT, -(-job.plan.rows // job.plan.rows_per_step)))
        for rank in range(job.plan.world)
        for micro in job.plan.micro_batches(step, rank)
        if micro.rows
    ]

    def size(micro: MicroBatch) -> int:
        found = [lengths[row] for row, _ in micro.rows]
        return sum(found) if packed else max(found) * len(found)

    rows = [(job.samples[row], epoch) for row, epoch in max(micros, key=size).rows]
    pad = 0 if hasattr(job.renderer, "assemble") else job.adapted.backbone.pad_token_id
    return assemble(job.renderer, rows, pad_token_id=pad)


def sizes_of(batch: Batch, config: object) -> StepSizes:
    """Rows, targets and patches of a batch: a line's rows by its table of segments. Answers behind one prompt are one
    row, and a state that predicts the first token of several one target."""
    mask, ids = batch.inputs.get("attention_mask"), batch.inputs["input_ids"]
    rows: Sequence[int] = (ids.shape[1],) * ids.shape[0]
    if mask is not None and mask.dim() == 4 and not isinstance(batch, PreferenceBatch):
        rows = [end - start for start, end, *_ in mask[0, 0].tolist()]
    pixels = sum(value.numel() for name, value in batch.inputs.items() if name.startswith("pixel_values"))
    for one in batch.pictures:
        pixels += sum(value.numel() for name, value in one.inputs.items() if name.startswith("pixel_values"))
    targets = len(batch.at.unique()) if isinstance(batch, PreferenceBatch) else batch.supervised
    return StepSizes(tuple(rows), targets, patches_of(config, pixels))


def probe(job: TrainJob, batch: Batch, *, count: int, device: torch.device) -> int:
    """The peak of a forward and backward pass with `count` recomputed layers; no number of the run depends on it.

    Where the memory runs out in it the answer is as if nothing could ever be enough.
    """
    model = job.adapted.model
    layers = checkpoint_layers(job.adapted, count) if count else []
    set_modes(job.adapted)
    for layer in layers:
        layer.training = True
    dtype = job.adapted.backbone.model.dtype

    def half() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if job.section.bf16 else nullcontext()

    def placed(one: Batch) -> Batch:
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in one.inputs.items()}
        return job.prepare(replace(one, inputs=inputs).to(device))

    try:
        with torch.random.fork_rng(devices=[]), Peak() as peak, memory_errors("the probe step", batch.ids):
            if isinstance(job.objective, StepObjective):
                step = StepContext(float(job.objective.count(batch)), (0,), placed, half)
                job.objective.backward(model, [batch], step)
            else:
                with half():
                    loss = job.objective.loss(model, placed(batch))
                loss.sum.backward()
        return peak.bytes
    except MemoryLimitError:
        return 1 << 62
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        model.zero_grad(set_to_none=True)
        give_back()
