"""Batches of questions whose answers a model makes itself, and the rows that come of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmft.data.collate import Batch, collate
from mmft.data.render import IGNORED, OverLength, Rendered, Renderer
from mmft.data.sample import Sample


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Questions padded on the left, ready for generation; `supervised` is their number. `rows` are the same questions
    one by one, `samples` where they came from."""

    rows: tuple[Rendered, ...] = ()
    samples: tuple[Sample, ...] = ()


class PromptRenderer:
    """Renders all before the last answer of each row; that answer is a reference only."""

    def __init__(self, inner: Renderer, *, pad_token_id: int) -> None:
        self.inner = inner
        self.pad_token_id = pad_token_id
        self.max_length = inner.max_length
        self.over_length: OverLength = inner.over_length

    def length(self, sample: Sample) -> int:
        """Tokens of the row with its own answer."""
        return self.inner.length(sample)

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> PromptBatch:
        """The questions of (sample, epoch) rows. Raises DataError naming a bad row."""
        return prompt_batch(
            [self.inner.prompt(sample) for sample, _ in rows],
            [sample for sample, _ in rows],
            pad_token_id=self.pad_token_id,
        )


def prompt_batch(rows: Sequence[Rendered], samples: Sequence[Sample], *, pad_token_id: int) -> PromptBatch:
    """Left-padded questions."""
    batch = collate(rows, pad_token_id=pad_token_id, side="left")
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    return PromptBatch(**values | {"supervised": len(rows)}, rows=tuple(rows), samples=tuple(samples))


def answered(row: Rendered, answer: torch.Tensor) -> Rendered:
    """The question with an answer's tokens (n,) behind it, labels on the answer.

    What the processor says of each token (its type, which pictures it may look at) goes on as at the question's end.
    """
    length, more = len(row.input_ids), len(answer)
    media = {}
    for name, value in row.media.items():
        along = not value.is_floating_point() and tuple(value.shape[:2]) == (1, length)
        rest = value[:, -1:].expand(1, more, *value.shape[2:]) if along else None
        media[name] = value if rest is None else torch.cat([value, rest], dim=1)
    return dataclasses.replace(
        row,
        input_ids=torch.cat([row.input_ids, answer]),
        labels=torch.cat([torch.full_like(row.input_ids, IGNORED), answer]),
        media=media,
        text_tokens=row.text_tokens + more,
    )
