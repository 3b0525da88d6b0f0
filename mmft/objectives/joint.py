"""Contrastive, matching and captioning heads trained together, after ALBEF, BLIP and CoCa.

    loss = w_c * contrastive + w_m * matching + w_g * caption

- contrastive: symmetric InfoNCE or the sigmoid loss (`contrastive`), over the whole optimizer step.
- matching (ALBEF, Li et al. 2021, arXiv 2107.07651, 3.2): cross-entropy of "do these two belong together" over every
  text with its picture, every picture with one wrong text and every text with one wrong picture, averaged over all.
  A wrong text is drawn with probability proportional to exp(t s_ij) among the texts of other groups (hard negatives of
  no group included), a wrong picture likewise: the harder the likelier. Candidates are the micro-batch's, as ALBEF's
  are those of one device; draws are a function of (seed, step, micro-batch).
- caption: `- sum over tokens of log p(token | those before it, picture) / tokens`, BLIP's language modelling term and
  CoCa's captioning term (Yu et al. 2022, arXiv 2205.01917, eq. 2; their code takes the mean over tokens).

Weights: ALBEF and BLIP use 1, 1, 1; CoCa 1, 0, 2. Price: over the contrastive loss one forward of the matching head on
three pairs and one of the decoder on one pair for each text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.pairs import EXTRA, LEFT, RIGHT
from mmft.errors import BackboneError
from mmft.objectives.base import Loss, StepContext, by_source
from mmft.objectives.contrastive import Kind, contrastive_loss
from mmft.objectives.contrastive_cached import gathered_loss, reported, told_by_source
from mmft.objectives.contrastive_embed import clamp_scales, similarity
from mmft.objectives.joint_heads import Heads, Seen, heads_of
from mmft.objectives.sft import head_on_rows
from mmft.seeds import fold


@dataclass(frozen=True)
class Words:
    """Texts of a batch: ids and mask (m, T), their groups (m,) and those of the pictures (n,)."""

    ids: Tensor
    mask: Tensor
    groups: Tensor
    left_groups: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Words:
        """The texts of a batch's inputs; without a mask all tokens count."""
        ids = inputs["input_ids"]
        return cls(ids, inputs.get("attention_mask", torch.ones_like(ids)), inputs[RIGHT], inputs[LEFT])


@dataclass(frozen=True)
class Looked:
    """One forward of the towers: pictures, the texts' embeddings, and what the texts are."""

    seen: Seen
    texts: Tensor
    words: Words


def partners(left_groups: Tensor, right_groups: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures, texts): every text of a group with a picture of it; several pictures of a group take turns."""
    places: dict[int, list[int]] = {}
    for place, group in enumerate(left_groups.tolist()):
        places.setdefault(group, []).append(place)
    turn: dict[int, int] = {}
    pairs = []
    for text, group in enumerate(right_groups.tolist()):
        if group != EXTRA and group in places:
            own = places[group]
            pairs.append((own[turn.get(group, 0) % len(own)], text))
            turn[group] = turn.get(group, 0) + 1
    found = torch.tensor(pairs, dtype=torch.long, device=left_groups.device).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def wrong_rows(left_groups: Tensor, right_groups: Tensor) -> tuple[Tensor, Tensor]:
    """(pictures, texts) that have a group and something of another one to be confused with."""
    other = left_groups[:, None] != right_groups[None, :]
    real = (left_groups != EXTRA)[:, None] & other
    pictures = real.any(dim=1).nonzero()[:, 0]
    texts = (((right_groups != EXTRA)[None, :] & other).any(dim=0)).nonzero()[:, 0]
    return pictures, texts


def draw_wrong(logits: Tensor, own: Tensor, other: Tensor, *, seed: int) -> Tensor:
    """For each row of `logits` (k, m) a column of another group, with probability softmax over those columns.

    `own` (k,) and `other` (m,) are groups. The draw is the inverse of the cumulative distribution in float64 at one
    uniform number a row, so it does not depend on the device. Every row must have a column of another group.
    """
    allowed = own[:, None] != other[None, :]
    shares = logits.detach().double().cpu().masked_fill(~allowed.cpu(), float("-inf")).softmax(dim=1)
    edges = shares.cumsum(dim=1)
    uniform = torch.rand((len(logits), 1), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = torch.searchsorted(edges, uniform * edges[:, -1:], right=True)[:, 0]
    last = edges.shape[1] - 1 - (shares > 0).long().flip(1).argmax(dim=1)
    return torch.minimum(place, last).to(logits.device)


def matching_terms(heads: Heads, looked: Looked, *, seed: int) -> tuple[Tensor, Tensor]:
    """(what each picture and its texts add to the sum of cross-entropies (n,), number right) of the matching term; its
    count is `matching_count`."""
    words, similar = looked.words, similarity(looked.seen.embeds, looked.texts).detach()
    terms = heads.scale()
    pictures, texts = partners(words.left_groups, words.groups)
    some_pictures, some_texts = wrong_rows(words.left_groups, words.groups)
    left, right = words.left_groups, words.groups
    wrong_texts = draw_wrong(
        (similar * terms.left)[some_pictures], left[some_pictures], right, seed=fold(seed, "texts")
    )
    wrong_pictures = draw_wrong(
        (similar.T * terms.right)[some_texts], right[some_texts], left, seed=fold(seed, "pictures")
    )
    rows = torch.cat([pictures, some_pictures, wrong_pictures])
    columns = torch.cat([texts, wrong_texts, some_texts])
    wanted = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    wanted[: len(pictures)] = 1
    logits = heads.match(looked.seen.tokens[rows], words.ids[columns], words.mask[columns])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.zeros_like(right).index_copy(0, texts, pictures)
    whose = torch.cat([pictures, some_pictures, own[some_texts]])
    nats = F.cross_entropy(logits, wanted, reduction="none")
    return by_picture(nats, whose, looked), (logits.argmax(dim=1) == wanted).sum()


def by_picture(terms: Tensor, whose: Tensor, looked: Looked) -> Tensor:
    """(n,) sums of terms (k,) by the picture `whose` (k,) they are."""
    return terms.new_zeros(len(looked.words.left_groups)).index_add(0, whose, terms)


def log_likelihoods(heads: Heads, tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(k,) sums over tokens of `log p(token | those before it, picture)`; the first token is given.

    The vocabulary head sees the states of real tokens only (`sft.head_on_rows`).
    """
    real = mask[:, 1:] != 0
    with head_on_rows(heads.head, F.pad(real, (0, 1), value=False)):
        logits = heads.write(tokens, ids, mask)
    wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(wide, ids[:, 1:][real], reduction="none")
    return -nats.new_zeros(len(ids)).index_add(0, real.nonzero()[:, 0], nats)


def caption_terms(heads: Heads, looked: Looked) -> Tensor:
    """What each picture's texts add to the caption term's sum over tokens, (n,); its count is `caption_count`."""
    words = looked.words
    pictures, texts = partners(words.left_groups, words.groups)
    nats = log_likelihoods(heads, looked.seen.tokens[pictures], words.ids[texts], words.mask[texts])
    return by_picture(-nats, pictures, looked)


def matching_count(words: Words) -> int:
    """Pairs that the matching term looks at."""
    pictures, texts = wrong_rows(words.left_groups, words.groups)
    return len(partners(words.left_groups, words.groups)[1]) + len(pictures) + len(texts)


def caption_count(words: Words) -> int:
    """Tokens that the caption term predicts."""
    return int(words.mask[partners(words.left_groups, words.groups)[1]][:, 1:].sum())


class JointObjective:
    """The weighted sum of the module's docstring; `weights` by term, those of 0 are not computed.

    Batches are those of `PairRenderer`. Raises BackboneError when the model lacks a term that has a weight.
    """

    name = "joint"
    metrics: dict[str, tuple[str, str]]

    def __init__(
        self, model: nn.Module, *, weights: Mapping[str, float], kind: Kind = "infonce", seed: int = 0
    ) -> None:
        self.weights: dict[str, float] = {name: float(weight) for name, weight in weights.items() if weight}
        self.kind: Kind = kind
        self.seed = seed
        self.metrics = {"batch_accuracy": ("correct", "count"), **{name: (name, "count") for name in self.weights}}
        if "matching" in self.weights:
            self.metrics["matching_accuracy"] = ("matched", "count")
        heads = heads_of(model)
        lacking = [name for name in self.needs() if name not in heads.terms]
        if lacking:
            raise BackboneError(
                f"{type(heads).__name__.strip('_')} has no head for: {', '.join(lacking)}",
                where="objective.joint_weights",
                allowed=f"weights of {', '.join(heads.terms)}",
                do="set that weight to 0, or take a model that writes (a dual encoder is given a decoder)",
            )

    def needs(self) -> list[str]:
        """Heads of the model that are used."""
        return list(self.weights)

    def count(self, batch: Batch) -> int:
        """Pictures of the batch that belong to a pair."""
        return int((batch.inputs[LEFT] != EXTRA).sum())

    # -- the terms of one micro-batch; `DualObjective` adds one ---------------------------------------------------

    def counts(self, words: Words) -> dict[str, int]:
        """Term -> what its sum is a sum over, without a forward."""
        found = {}
        if "matching" in self.weights:
            found["matching"] = matching_count(words)
        if "caption" in self.weights:
            found["caption"] = caption_count(words)
        return found

    def sums(self, heads: Heads, looked: Looked, *, seed: int) -> dict[str, Tensor]:
        """Term -> what each picture adds to its sum (n,) with a graph, and further sums to be logged."""
        found = {}
        if "matching" in self.weights:
            found["matching"], found["matched"] = matching_terms(heads, looked, seed=fold(seed, "wrong"))
        if "caption" in self.weights:
            found["caption"] = caption_terms(heads, looked)
        return found

    def matched(self, model: nn.Module, left: Tensor, right: Tensor, left_groups: Tensor, right_groups: Tensor) -> Loss:
        """The weighted contrastive term of embeddings."""
        terms = heads_of(model).scale()
        loss = contrastive_loss(
            left, right, left_groups=left_groups, right_groups=right_groups, terms=terms, kind=self.kind
        )
        weight = self.weights.get("contrastive", 0.0)
        each = None if loss.each is None else loss.each * weight
        return Loss(loss.sum * weight, loss.count, {**loss.logs, "contrastive": loss.sum.detach()}, each)

    # -- the engine's two doors ------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss of one batch by itself."""
        looked = look(heads_of(model), batch.inputs, seed=None)
        return self._whole(model, looked, seed=fold(self.seed, "alone", *batch.ids), counts=self.counts(looked.words))

    def backward(self, model: nn.Module, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
        """This rank's share of the step's gradients into the trained parameters, and of the sums.

        The contrastive term is that of one large batch over all micro-batches and ranks (two passes, as in
        `contrastive_cached`); the others are averaged over the step's pairs and tokens.
        """
        with step.together():
            placed = [step.place(batch).inputs for batch in micros]
            words = [Words.of(inputs) for inputs in placed]
        counts = _over_ranks([self.counts(one) for one in words], step, device=words[0].ids.device)
        heads = heads_of(model)
        if len(micros) == 1 and step.world == 1:
            with step.autocast():
                looked = look(heads, placed[0], seed=step.seeds[0])
                loss = self._whole(model, looked, seed=step.seeds[0], counts=counts)
            (loss.sum / max(step.count, 1)).backward()
            return reported(loss, micros, step)
        sums, cached = self._contrasted(model, micros, placed, step=step)
        for number, inputs in enumerate(placed):
            with step.autocast():
                looked = look(heads, inputs, seed=step.seeds[number])
                torch.manual_seed(fold(step.seeds[number], "pairs"))
                terms = self.sums(heads, looked, seed=step.seeds[number])
                total, each, logs = self._combined(terms, looked, counts=counts, times=step.count)
            logs |= {key: one for key, one in by_source(each, micros[number]).items() if key.startswith("loss of ")}
            down = total / max(step.count, 1)
            if cached is not None:
                down = down + sum((value * cached[side][number]).sum() for side, value in _embedded(looked))
            if down.requires_grad:
                down.backward()
            for name, value in {"loss": total.detach(), **logs}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """After an update: the scale stays at or below 100."""
        clamp_scales(weights)

    def _whole(self, model: nn.Module, looked: Looked, *, seed: int, counts: Mapping[str, float]) -> Loss:
        words, seen = looked.words, looked.seen
        loss = self.matched(model, seen.embeds, looked.texts, words.left_groups, words.groups)
        terms = self.sums(heads_of(model), looked, seed=seed)
        total, each, logs = self._combined(terms, looked, counts=counts, times=loss.count)
        return Loss(
            loss.sum + total, loss.count, {**loss.logs, **logs}, each if loss.each is None else each + loss.each
        )

    def _combined(
        self, terms: Mapping[str, Tensor], looked: Looked, *, counts: Mapping[str, float], times: float
    ) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """`times` the weighted sum of the terms' means, what each picture adds to it (n,), and the logs on the same
        footing."""
        total: Any = torch.zeros(())
        each, logs = torch.zeros_like(looked.words.left_groups, dtype=torch.float32), {}
        for name, value in terms.items():
            shares = value * (times / max(counts.get(_COUNTED_AS.get(name, name), 0), 1))
            share = shares.sum()
            logs[name] = share.detach()
            if name in self.weights:
                total = total + share * self.weights[name]
                each = each + shares.detach() * self.weights[name]
        return total, each, logs

    def _contrasted(
        self,
        model: nn.Module,
        micros: Sequence[Batch],
        placed: Sequence[Mapping[str, Tensor]],
        *,
        step: StepContext,
    ) -> tuple[dict[str, float], list[list[Tensor]] | None]:
        """The contrastive term of the step: this rank's sums, and gradients at its embeddings by side and micro-batch;
        the scale's gradient is in place."""
        if "contrastive" not in self.weights:
            ones = [torch.zeros(len(batch.counted)) for batch in micros]
            return told_by_source(Loss(torch.zeros(()), 0, each=torch.cat(ones)), micros), None
        heads, rows = heads_of(model), []
        with step.together(), torch.no_grad(), step.autocast():
            for number, inputs in enumerate(placed):
                rows.append([value for _, value in _embedded(look(heads, inputs, seed=step.seeds[number]))])
        local = [[row[side] for row in rows] for side in (0, 1)]
        groups = [torch.cat([inputs[name] for inputs in placed]) for name in (LEFT, RIGHT)]
        loss, cached = gathered_loss(self, model, local, groups, step=step)
        return reported(loss, micros, step), cached


_COUNTED_AS = {"matched": "matching", "returned": "there"}
"""Logs that are averaged over another term's count."""


def look(heads: Heads, inputs: Mapping[str, Tensor], *, seed: int | None) -> Looked:
    """One forward of both towers; with a seed each tower draws its dropout from its own."""
    words = Words.of(inputs)
    if seed is not None:
        torch.manual_seed(fold(seed, "image"))
    seen = heads.see(inputs["pixel_values"])
    if seed is not None:
        torch.manual_seed(fold(seed, "text"))
    texts = heads.read(words.ids, words.mask)
    if seed is not None:
        torch.manual_seed(fold(seed, "pairs"))
    return Looked(seen, texts, words)


def _embedded(looked: Looked) -> list[tuple[int, Tensor]]:
    return [(0, looked.seen.embeds), (1, looked.texts)]


def _over_ranks(counts: Sequence[Mapping[str, int]], step: StepContext, *, device: torch.device) -> dict[str, float]:
    """The terms' counts of the whole step."""
    names = sorted({name for one in counts for name in one})
    values = torch.tensor([float(sum(one.get(name, 0) for one in counts)) for name in names], device=device)
    if step.world > 1:
        dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))
