"""Large contrastive batches in the memory of a small one, exactly: gradients cached at the embeddings.

GradCache (Gao et al. 2021, arXiv 2101.06983). First pass, without graphs: embeddings of every micro-batch, gathered
over the ranks. Then the loss of all rows at once and its gradients with respect to embeddings, scale and bias. Second
pass: every micro-batch is embedded again, now with a graph, and the cached gradients are sent down. Dropout is drawn
from one seed per (micro-batch, side), so both passes see the same masks.

Price: one more forward. A side on which nothing is trained is embedded once; a step that is one micro-batch on one
rank takes the plain way. Every rank computes the whole matrix of similarities of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.pairs import LEFT, RIGHT
from mmft.objectives.base import Loss, StepContext, by_source
from mmft.objectives.contrastive_embed import Side, embed, scales
from mmft.seeds import fold

_GROUPS = (LEFT, RIGHT)


class Matches(Protocol):
    """The loss of embeddings of a whole step."""

    def matched(self, model: nn.Module, left: Tensor, right: Tensor, left_groups: Tensor, right_groups: Tensor) -> Loss:
        """The loss of embeddings of length one with the groups of their rows."""
        ...


class Matching(Matches, Protocol):
    """What the two passes ask of an objective: its sides too."""

    left: Side
    right: Side


def cached_step(objective: Matching, model: nn.Module, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
    """Accumulate the gradients of `loss.sum / step.count` over all rows of the step; sums of this rank's share.

    The loss is the same on all ranks, so rank 0 reports it and the others report 0; by data set each rank tells what
    its own rows add.
    """
    both: tuple[Side, Side] = (objective.left, objective.right)
    if len(micros) == 1 and step.world == 1:
        loss = _plain(objective, model, micros[0], step)
    else:
        with step.together(), torch.no_grad():
            rows = [_embedded(model, batch, both, step=step, number=n) for n, batch in enumerate(micros)]
        local = [[row[side] for row in rows] for side in (0, 1)]
        groups = [torch.cat([batch.inputs[name] for batch in micros]) for name in _GROUPS]
        loss, cached = gathered_loss(objective, model, local, groups, step=step)
        _second_pass(model, micros, both, cached=cached, step=step)
    return reported(loss, micros, step)


def reported(loss: Loss, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
    """What a rank reports of the step's loss, whose `each` are its own rows."""
    sums = {"loss": loss.sum, **loss.logs}
    found = {name: float(value.detach()) if step.rank == 0 else 0.0 for name, value in sums.items()}
    return found | told_by_source(loss, micros)


def told_by_source(loss: Loss, micros: Sequence[Batch]) -> dict[str, float]:
    """`by_source` of the rows of several micro-batches."""
    if loss.each is None or len(loss.each) != sum(len(batch.counted) for batch in micros):
        return {}
    found: dict[str, float] = {}
    for batch, part in zip(micros, loss.each.split([len(batch.counted) for batch in micros]), strict=True):
        for name, value in by_source(part, batch).items():
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _plain(objective: Matching, model: nn.Module, batch: Batch, step: StepContext) -> Loss:
    both: tuple[Side, Side] = (objective.left, objective.right)
    placed = step.place(batch)
    left, right = _embedded(model, placed, both, step=step, number=0, placed=True)
    loss = objective.matched(model, left, right, placed.inputs[_GROUPS[0]], placed.inputs[_GROUPS[1]])
    (loss.sum / max(step.count, 1)).backward()
    return loss


def _embedded(
    model: nn.Module,
    batch: Batch,
    both: Sequence[Side],
    *,
    step: StepContext,
    number: int,
    placed: bool = False,
) -> list[Tensor]:
    """Embeddings of a micro-batch's sides, each with dropout from its own seed."""
    inputs = batch.inputs if placed else step.place(batch).inputs
    return [_one_side(model, inputs, side, step=step, number=number) for side in both]


def _one_side(model: nn.Module, inputs: Mapping[str, Tensor], side: Side, *, step: StepContext, number: int) -> Tensor:
    torch.manual_seed(fold(step.seeds[number], side))
    with step.autocast():
        return embed(model, inputs, side)


def gathered_loss(
    objective: Matches,
    model: nn.Module,
    local: Sequence[Sequence[Tensor]],
    groups: Sequence[Tensor],
    *,
    step: StepContext,
) -> tuple[Loss, list[list[Tensor]]]:
    """The step's loss, with `each` of this rank's rows; gradients at its embeddings, by side and micro-batch. Scale and
    bias get theirs on rank 0, because every rank would find the same and the ranks are summed."""
    own = [torch.cat(list(parts)).requires_grad_() for parts in local]
    groups = [value.to(own[0].device) for value in groups]
    wholes = [_gathered(value, step) for value in own]
    labels = [_gathered(value, step)[0] for value in groups]
    loss = objective.matched(model, wholes[0][0], wholes[1][0], labels[0], labels[1])
    if loss.each is not None:
        loss = replace(loss, each=loss.each[wholes[0][1] :][: len(own[0])])
    learned = [value for value in scales(model).values() if value.requires_grad]
    found = torch.autograd.grad(loss.sum / max(step.count, 1), [*own, *learned], allow_unused=True)
    if step.rank == 0:
        for value, gradient in zip(learned, found[2:], strict=True):
            if gradient is not None:
                value.grad = gradient if value.grad is None else value.grad + gradient
    cached = [list(found[side].split([len(part) for part in local[side]])) for side in (0, 1)]
    return loss, cached


def _second_pass(
    model: nn.Module,
    micros: Sequence[Batch],
    both: Sequence[Side],
    *,
    cached: Sequence[Sequence[Tensor]],
    step: StepContext,
) -> None:
    frozen: set[Side] = set()
    for number, batch in enumerate(micros):
        inputs = step.place(batch).inputs
        for position, side in enumerate(both):
            if side in frozen:
                continue
            again = _one_side(model, inputs, side, step=step, number=number)
            if again.requires_grad:
                again.backward(cached[position][number])
            else:
                frozen.add(side)


def _gathered(own: Tensor, step: StepContext) -> tuple[Tensor, int]:
    """Rows of all ranks in the order of ranks, and where this rank's begin, which are `own` itself, so that gradients
    reach it."""
    if step.world == 1:
        return own, 0
    sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(step.world)]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    longest = int(max(sizes))
    padded = own.new_zeros((longest, *own.shape[1:]))
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in range(step.world)]
    dist.all_gather(parts, padded)
    wholes = [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
    wholes[step.rank] = own
    return torch.cat(wholes), int(sum(sizes[: step.rank]))
