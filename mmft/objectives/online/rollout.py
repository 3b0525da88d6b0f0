"""What one sampling of a micro-batch leaves: answers, what they are worth, and what is learned of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from mmft.data.collate import Batch
from mmft.data.prompts import PromptBatch, prompt_batch
from mmft.data.sample import Sample
from mmft.objectives.online.sampling import Drawn


@dataclass(frozen=True)
class Attempt:
    """One sampled answer to a row; what a reward function is given. `tokens` counts the end token too."""

    sample: Sample
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Judged:
    """`total` (N,): the weighted rewards; `true` (N,): the score that rewards stand for; `parts`: each reward (N,)."""

    total: Tensor
    true: Tensor
    parts: dict[str, Tensor]


class Judge(Protocol):
    """What rewards answers. Raises DataError or NonFiniteError naming the sample where it cannot."""

    names: tuple[str, ...]
    """Of the rewards, in their order."""

    def __call__(self, attempts: Sequence[Attempt]) -> Judged:
        """Rewards of the answers, in their order."""
        ...


@dataclass
class Rollout:
    """The answers to one micro-batch of questions, k to each, and all (N, C) that is learned of them."""

    batch: PromptBatch
    rows: Batch
    drawn: Drawn
    judged: Judged
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    old: Tensor | None = None
    reference: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    @property
    def k(self) -> int:
        """Answers to each question."""
        return len(self.drawn.tokens) // len(self.batch.rows)

    def groups(self, values: Tensor) -> Tensor:
        """(N,) -> (P, k)."""
        return values.reshape(len(self.batch.rows), self.k)


def part_of(batch: PromptBatch, drawn: Drawn, keep: Tensor, *, k: int, pad_token_id: int) -> tuple[PromptBatch, Drawn]:
    """The questions where `keep` (P,) is true and the first k of each one's answers."""
    places = keep.nonzero()[:, 0].tolist()
    own = len(drawn.tokens) // len(batch.rows)
    answers = torch.tensor([place * own + which for place in places for which in range(k)], dtype=torch.int64)
    rows, samples = [batch.rows[place] for place in places], [batch.samples[place] for place in places]
    fields = {name: getattr(drawn, name)[answers] for name in ("tokens", "mask", "log_probs", "entropy", "ended")}
    return prompt_batch(rows, samples, pad_token_id=pad_token_id), replace(drawn, **fields)
