"""Cross-entropy of captions, for encoder-decoders and for decoders that see a picture.

Formula: `sum over (b, t) with labels[b, t] != -100 of  -log softmax(head(h[b, t]))[labels[b, t]]`, where h[b, t] is the
decoder's state after reading its t-th token (`data.captions` lines the two up). With label smoothing e over V tokens
the target is (1 - e) on the label and e / V on every token (Szegedy et al. 2016), as in torch's cross_entropy. Price:
the head costs `supervised * hidden * vocabulary` products: it sees the supervised states only, chosen by a forward
pre-hook on the output embeddings; what a family does to its logits afterwards still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.captions import CaptionShape
from mmft.data.collate import Batch
from mmft.data.render import IGNORED
from mmft.errors import BackboneError
from mmft.objectives.base import Loss, by_source


@contextmanager
def head_on_text(head: nn.Module, rows: Tensor) -> Iterator[None]:
    """While open, `head` sees only the states where `rows` (batch, length) is true, as (1, n, hidden). States of a
    picture may stand before those of the tokens."""

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        if hidden.dim() != 3 or len(hidden) != len(rows) or hidden.shape[1] < rows.shape[1]:
            raise BackboneError(
                f"the vocabulary head gets states of shape {tuple(hidden.shape)} for tokens of {tuple(rows.shape)}",
                where=type(head).__name__,
                allowed="one state for each token of the decoder, behind those of the picture",
                do="train this model on conversations: objective.name: sft",
            )
        return (hidden[:, hidden.shape[1] - rows.shape[1] :][rows].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class CaptioningObjective:
    """Cross-entropy of the captions' tokens. `head` is the model's output embeddings, or None where it has none that
    can be found: the logits of all positions are then computed, and the supervised ones kept."""

    name = "captioning"
    metrics = {"token_accuracy": ("correct", "count")}

    def __init__(self, *, head: nn.Module | None, shape: CaptionShape, label_smoothing: float = 0.0) -> None:
        self.head = head
        self.label_smoothing = label_smoothing
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in shape.accepts else {}

    def count(self, batch: Batch) -> int:
        """Supervised positions of the batch."""
        return batch.supervised

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """`Loss(sum, count)` of one forward; `logs["correct"]` counts greedy hits."""
        rows = batch.labels != IGNORED
        with head_on_text(self.head, rows) if self.head is not None else nullcontext():
            logits = model(**batch.inputs, **self.options).logits
        if self.head is None:
            logits = logits[:, logits.shape[1] - rows.shape[1] :][rows]
        wanted = batch.labels[rows]
        scores = logits.reshape(-1, logits.shape[-1]).float()
        terms = F.cross_entropy(scores, wanted, reduction="none", label_smoothing=self.label_smoothing)
        correct = (scores.detach().argmax(-1) == wanted).sum()
        return Loss(terms.sum(), batch.supervised, {"correct": correct} | by_source(terms, batch))
