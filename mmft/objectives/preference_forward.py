"""Log-probabilities of answers by one forward, and when answers may share their prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmft.data.preference_render import PreferenceBatch, PreferenceRenderer
from mmft.data.sample import Sample
from mmft.errors import MmftError
from mmft.objectives.sft import head_on_rows

CHECKED = 2
"""Samples on which the shared layout is compared with plain rows before it is used."""
LIMITS = {torch.float32: 1e-3, torch.float64: 1e-6}
"""What a token's log-probability may differ by there; 16-bit types: 0.2, the rounding of some layers."""


def answer_logps(
    model: nn.Module, head: nn.Module, batch: PreferenceBatch, *, ahead: int = 0, tokens: bool = False
) -> Tensor:
    """`log p` of every answer, (R,) float32: the sum over its tokens (`tokens`: of each token, (N,)).

    The head is computed at the states that predict an answer's token and nowhere else; a state that several answers
    share (the last of the prompt) once.
    """
    ids = batch.inputs["input_ids"]
    at, target, row = (value.to(ids.device) for value in (batch.at, batch.target, batch.row))
    wanted = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
    wanted[at] = True
    with head_on_rows(head, wanted.view(ids.shape), ahead=ahead):
        logits = model(**batch.inputs, use_cache=False).logits
    scores = logits.reshape(-1, logits.shape[-1])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    state = (wanted.long().cumsum(0) - 1)[at]
    found = scores[state, target] - scores.logsumexp(-1)[state]
    return found if tokens else found.new_zeros(len(batch.owner)).index_add(0, row, found)


def share_where_exact(
    model: nn.Module,
    renderer: PreferenceRenderer,
    samples: Sequence[Sample],
    *,
    run: Callable[[PreferenceBatch], Tensor],
) -> str | None:
    """Let the renderer use the shared layout if it gives this model's numbers; else the reason why not.

    Seen on real rows: numbers of one answer (`run`, one a token or answer) may not change by a bit when another answer
    of the sample does (an attention or state that is not causal, or a mask that is not read), and must be those of
    plain rows (positions that do not follow `position_ids`).
    """
    rows = [(sample, 0) for sample in samples if len(sample.candidates) > 1][:CHECKED]
    if not rows:
        return "no sample has two answers"
    if any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout)):
        return "with dropout each answer draws its own"
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            reason = _difference(model, renderer, rows, run)
    except (MmftError, ValueError, TypeError, RuntimeError, KeyError, IndexError, NotImplementedError) as error:
        reason = f"the model refuses it ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    finally:
        for module, training in was:
            module.training = training
    renderer.share = reason is None
    return reason


def _difference(
    model: Any,
    renderer: PreferenceRenderer,
    rows: Sequence[tuple[Sample, int]],
    run: Callable[[PreferenceBatch], Tensor],
) -> str | None:
    renderer.share = False
    plain = renderer.assemble(rows)
    renderer.share = True
    shared = renderer.assemble(rows)
    if len(shared.inputs["input_ids"]) == len(plain.inputs["input_ids"]):
        return "the answers have pictures of their own"
    first, second = run(plain).double(), run(shared).double()
    off = float((first - second).abs().max())
    if not off <= LIMITS.get(model.dtype, 0.2):
        return f"numbers differ by {off:.2g} from those of single rows"
    changed = run(_first_answers_changed(shared)).double()
    others = shared.rank > 0
    others = (others[shared.row] if len(changed) == len(shared.row) else others).to(changed.device)
    return None if torch.equal(changed[others], second[others]) else "an answer's numbers depend on another answer"


def _first_answers_changed(batch: PreferenceBatch) -> PreferenceBatch:
    """The batch with all tokens of the first answers replaced by the sequences' first token."""
    ids = batch.inputs["input_ids"].clone()
    flat = ids.view(-1)
    for answer in (batch.rank == 0).nonzero()[:, 0].tolist():
        own = [*batch.at[batch.row == answer][1:].tolist(), int(batch.last[answer])]
        flat[own] = int(flat[int(batch.last[answer]) // ids.shape[1] * ids.shape[1]])
    return dataclasses.replace(batch, inputs={**batch.inputs, "input_ids": ids})
