"""Supervised fine-tuning: next-token cross-entropy of the answers, with the vocabulary head on supervised rows only.

Formula: `sum over (b, t) with labels[b, t+1] != -100 of  -log softmax(head(h[b, t]))[labels[b, t+1]]`.
Price: the head costs `supervised * hidden * vocabulary` products instead of `batch * length * hidden * vocabulary`;
in a question-answering batch that is a tenth of it. The rows are chosen by a forward pre-hook on the output
embeddings, so whatever a family does to its logits afterwards (soft-capping, a scale) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.render import IGNORED
from mmft.errors import BackboneError
from mmft.objectives.base import Loss, by_source


@contextmanager
def head_on_rows(head: nn.Module, rows: Tensor, *, ahead: int = 0) -> Iterator[None]:
    """While open, `head` sees only the hidden states where `rows` (batch, length) is true, as (1, n, hidden).

    `ahead` states stand before those of the tokens: the virtual tokens of prompt tuning.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if ahead:
            hidden = hidden[:, ahead:]
        if hidden.shape[:2] != rows.shape:
            raise BackboneError(
                f"the vocabulary head gets hidden states of shape {tuple(hidden.shape[:2])} for tokens of shape "
                f"{tuple(rows.shape)}",
                where=type(head).__name__,
                allowed="one hidden state for each token",
                do="use a processor that expands its image placeholders (transformers >= 5.0 layouts do)",
            )
        return (hidden[rows].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class SftObjective:
    """Cross-entropy of supervised tokens; `head` is the model's output embeddings, `ahead` the number of virtual
    tokens that an adapter puts before the text. With `every_position` the head scores all positions (plain twin)."""

    name = "sft"
    metrics = {"token_accuracy": ("correct", "count")}

    def __init__(
        self, *, head: nn.Module, label_smoothing: float = 0.0, ahead: int = 0, every_position: bool = False
    ) -> None:
        self.head = head
        self.ahead = ahead
        self.label_smoothing = label_smoothing
        self.every_position = every_position

    def on_every_position(self) -> SftObjective:
        """The same loss with the head on all positions."""
        return SftObjective(head=self.head, label_smoothing=self.label_smoothing, ahead=self.ahead, every_position=True)

    def count(self, batch: Batch) -> int:
        """Supervised positions of the batch."""
        return batch.supervised

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """`Loss(sum, count)` of one forward; `logs["correct"]` counts greedy hits."""
        targets = batch.labels[:, 1:]
        rows = F.pad(targets != IGNORED, (0, 1), value=False)
        if self.every_position:
            logits = model(**batch.inputs, use_cache=False).logits[:, self.ahead :][rows]
        else:
            with head_on_rows(self.head, rows, ahead=self.ahead):
                logits = model(**batch.inputs, use_cache=False).logits
        wanted = targets[targets != IGNORED]
        scores = logits.reshape(-1, logits.shape[-1]).float()
        terms = F.cross_entropy(scores, wanted, reduction="none", label_smoothing=self.label_smoothing)
        correct = (scores.detach().argmax(-1) == wanted).sum()
        return Loss(terms.sum(), batch.supervised, {"correct": correct} | by_source(terms, batch))
