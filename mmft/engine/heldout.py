"""The mean loss of held-out rows, rank by rank and batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from mmft.data.collate import Batch
from mmft.data.loader import assemble
from mmft.data.sample import Sample
from mmft.engine.guards import is_memory_error, memory_errors
from mmft.engine.job import TrainJob
from mmft.engine.ranks import Ranks
from mmft.objectives.base import Loss


def mean_loss(
    job: TrainJob,
    samples: Sequence[Sample],
    *,
    pad: int,
    place: Callable[[Batch], Batch],
    ranks: Ranks,
) -> tuple[float, dict[str, float], list[str]]:
    """Mean loss over all supervised positions, as `eval_NAME` the metrics whose sums the objective's loss gave, and the
    ids of this rank's batches whose loss is not finite."""
    sums: dict[str, float] = {"loss": 0.0, "count": 0.0}
    bad: list[str] = []
    size = job.eval_batch_size
    with ranks.together("an evaluation", ()):
        for start in range(ranks.rank * size, len(samples) + ranks.rank * size, size * ranks.world):
            rows = samples[start : start + size]
            if not rows and ranks.lockstep:  # the others gather weights for a forward more
                job.objective.loss(
                    job.adapted.model, place(assemble(job.renderer, [(samples[0], 0)], pad_token_id=pad))
                )
            for ids, loss in _losses(job, rows, pad=pad, place=place, halves=not ranks.lockstep):
                sums["count"] += loss.count
                for name, value in {**loss.logs, "loss": loss.sum}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                if not math.isfinite(float(loss.sum)):
                    bad += ids
    metrics = job.objective.metrics
    names = sorted({"loss", "count"} | {name for pair in metrics.values() for name in pair})
    known = ranks.sum([float(name in sums) for name in names])  # a rank without rows has no sums
    found = dict(zip(names, ranks.sum([sums.get(name, 0.0) for name in names]), strict=True))
    there = {name for name, number in zip(names, known, strict=True) if number}
    further = {
        f"eval_{name}": found[part] / (found[over] or 1.0)
        for name, (part, over) in metrics.items()
        if {part, over} <= there
    }
    return found["loss"] / max(found["count"], 1), further, bad


def _losses(
    job: TrainJob, rows: Sequence[Sample], *, pad: int, place: Callable[[Batch], Batch], halves: bool = True
) -> Iterator[tuple[tuple[str, ...], Loss]]:
    """The loss of the rows in one forward; in two halves where the memory does not hold them and that is allowed."""
    if not rows:
        return
    batch = assemble(job.renderer, [(sample, 0) for sample in rows], pad_token_id=pad)
    loss = None
    try:
        with memory_errors("an evaluation", batch.ids):
            loss = job.objective.loss(job.adapted.model, place(batch))
    except Exception as error:
        if len(rows) == 1 or not halves or not is_memory_error(error):
            raise
    if loss is not None:
        yield batch.ids, loss
        return
    half = -(-len(rows) // 2)
    for part in (rows[:half], rows[half:]):
        yield from _losses(job, part, pad=pad, place=place)
