"""Reward models: one number for an answer, read off the state of its last token by a linear head in fp32.

Loss: Plackett-Luce over each ranking (for pairs Bradley-Terry, with a margin where the rows' scores give one), a term
that keeps rewards around zero, and one that teaches the read state the true answer. The head sits beside the vocabulary
head, so any generative backbone will do.

Why the last: a language model works an answer out at the token before it, in all its layers, and no later token can
read what only the last layer holds. The state behind the answer therefore need not know what is true, and a comparison
gives a small model no gradient towards finding out. `answer_weight` asks that state, through the vocabulary head, for
the first token of the ranking's best answer, whatever answer stands before it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.preference_render import PreferenceBatch
from mmft.objectives import preference_losses as losses
from mmft.objectives.base import Loss, by_source

HEAD = "reward_head"
"""Name of the head on the adapted model."""


def make_head(hidden: int) -> nn.Linear:
    """A head that gives every answer 0: training starts from no opinion and needs no random draw."""
    head = nn.Linear(hidden, 1, bias=False, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return head


def answer_rewards(
    model: nn.Module, vocabulary: nn.Module, head: nn.Linear, batch: PreferenceBatch, *, ahead: int = 0
) -> Tensor:
    """The reward of every answer, (R,) float32."""
    return judge(model, vocabulary, head, batch, ahead=ahead)[0]


def judge(
    model: nn.Module,
    vocabulary: nn.Module,
    head: nn.Linear,
    batch: PreferenceBatch,
    *,
    ahead: int = 0,
    words: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The reward of every answer, (R,) float32; with `words` also the vocabulary's scores after it, (R, V) float32.

    The states are caught where the `vocabulary` head gets them, which is then computed for them alone, or without
    `words` for one token. For a distributed wrapper, which looks for what was used in the forward's output, that
    output hangs on the reward (with weight zero), and without `words` not on the vocabulary head, whose adapters get
    no gradient there.
    """
    ids = batch.inputs["input_ids"]
    last = batch.last.to(ids.device)
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][:, ahead:] if ahead else args[0]
        states = hidden.reshape(-1, hidden.shape[-1])[last]
        with torch.autocast(states.device.type, enabled=False):
            caught.append(head(states.to(head.weight.dtype))[:, 0])
        return (states[None] if words else hidden[:, :1], *args[1:])

    def tie(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return (out if words else out.detach()) + 0.0 * caught[-1].sum().to(out.dtype)

    handles = [vocabulary.register_forward_pre_hook(catch), vocabulary.register_forward_hook(tie)]
    try:
        out = model(**batch.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return caught[-1], out.logits[0].float() if words else None


class RewardObjective:
    """Rankings (pairs among them) by their answers' rewards."""

    name = "reward"
    metrics = {
        "preference_accuracy": ("right", "pairs"),
        "reward_margin": ("margin", "pairs"),
        "reward_mean": ("rewards", "answers"),
    }

    def __init__(
        self,
        *,
        vocabulary: nn.Module,
        head: nn.Linear,
        margin: bool = False,
        centre_weight: float = 0.0,
        answer_weight: float = 0.0,
        ahead: int = 0,
    ) -> None:
        self.vocabulary, self.head, self.ahead = vocabulary, head, ahead
        self.margin, self.centre_weight, self.answer_weight = margin, centre_weight, answer_weight
        if answer_weight:
            self.metrics = {**self.metrics, "truth_known": ("known", "answers")}

    def count(self, batch: Batch) -> int:
        """Rankings of the batch."""
        return len(batch.ids)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum over rankings."""
        assert isinstance(batch, PreferenceBatch)
        words = self.answer_weight > 0
        rewards, scores = judge(model, self.vocabulary, self.head, batch, ahead=self.ahead, words=words)
        owner, rank = batch.owner.to(rewards.device), batch.rank.to(rewards.device)
        each = ranking_loss(rewards, owner, rank, batch.score.to(rewards) if self.margin else None)
        if self.centre_weight:
            sums = rewards.new_zeros(len(batch.ids)).index_add(0, owner, rewards)
            each = each + self.centre_weight * sums**2
        gaps = _gaps(rewards.detach(), owner, rank)
        logs = {"right": (gaps > 0).sum(), "pairs": torch.tensor(len(gaps)), "margin": gaps.sum()}
        logs |= {"rewards": rewards.detach().sum(), "answers": torch.tensor(len(rewards))}
        if scores is not None:
            best = best_tokens(batch).to(scores.device)
            truth = F.cross_entropy(scores, best, reduction="none") / torch.bincount(owner)[owner]
            each = each.index_add(0, owner, self.answer_weight * truth)
            logs["known"] = (scores.detach().argmax(-1) == best).sum()
        return Loss(sum=each.sum(), count=len(batch.ids), logs=logs | by_source(each, batch))


def best_tokens(batch: PreferenceBatch) -> Tensor:
    """Of every answer the first token of the best one to its prompt, (R,)."""
    first = torch.searchsorted(batch.row, torch.arange(len(batch.owner)))  # `row` ascends
    best = torch.zeros(len(batch.ids), dtype=torch.long)
    top = batch.rank == 0
    best[batch.owner[top]] = batch.target[first[top]]
    return best[batch.owner]


def ranking_loss(rewards: Tensor, owner: Tensor, rank: Tensor, score: Tensor | None) -> Tensor:
    """One loss a ranking; with `score` (R,) pairs have the difference of their scores as margin (nan: none)."""
    if score is None:
        return losses.plackett_luce(rewards, owner, rank)
    size = torch.bincount(owner)
    pairs = (size == 2)[owner]
    if not bool(pairs.all()):  # a margin is a matter of two answers
        score = torch.where(pairs, score, torch.nan)
    first = rank == 0
    second = torch.zeros_like(score).index_put((owner[rank == 1],), score[rank == 1])
    margin = torch.nan_to_num(score[first] - second[owner[first]], nan=0.0)
    shifted = rewards.clone()
    shifted[first] = rewards[first] - margin
    return losses.plackett_luce(shifted, owner, rank)


def _gaps(rewards: Tensor, owner: Tensor, rank: Tensor) -> Tensor:
    """Reward of the better less that of the worse, for every two answers of a ranking."""
    better = (owner[:, None] == owner[None, :]) & (rank[:, None] < rank[None, :])
    return (rewards[:, None] - rewards[None, :])[better]
