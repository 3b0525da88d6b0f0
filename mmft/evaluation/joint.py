"""Evaluation of a model that embeds, matches and writes.

- retrieval both ways by the embeddings (`image_to_text_r@1`, ...);
- the same re-ranked by the matching head (`reranked_image_to_text_r@1`, ...): the `RERANKED` best candidates of each
  query are ordered by the head's log-odds that the two belong together, before all others (ALBEF, arXiv 2107.07651, 4);
- captions, scored as texts, and whether a caption finds the picture it was written about (`self_retrieval_r@1`, Liu et
  al. 2018, arXiv 1803.08314): the picture's rank among all by the caption's own embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmft.data.pairs import PairRenderer, group_of
from mmft.data.sample import Sample
from mmft.evaluation.pairs import PairScores, score_pairs
from mmft.objectives.contrastive_embed import similarity
from mmft.objectives.joint_heads import Heads, Seen, heads_of

RERANKED = 16
"""Candidates of each query that the matching head looks at: 16 forwards of it for each query and direction."""


@dataclass(frozen=True)
class JointFound:
    """What one model says of one set: scores by embeddings, re-ranked (None without a matching head), captions and the
    scores of captions with pictures (None where it does not write)."""

    plain: PairScores
    reranked: PairScores | None
    captions: tuple[str, ...] | None
    returned: PairScores | None


@torch.no_grad()
def look_at_pairs(
    model: nn.Module,
    renderer: PairRenderer,
    samples: Sequence[Sample],
    *,
    terms: Sequence[str],
    batch_size: int,
    options: Mapping[str, Any],
    progress: Callable[[int], None] | None = None,
) -> JointFound:
    """Run the heads of `terms` on a set; `options` are those of `generate`. The model is put into eval() and back."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(map(group_of, samples)))}
    owners = [(text, numbers[group_of(one)]) for one in samples for text in one.answers]
    owners += [(text, -1) for one in samples for text in one.negatives]
    left = tuple(numbers[group_of(one)] for one in samples)
    right = tuple(group for _, group in owners)
    heads = heads_of(model)
    with _evaluating(model):
        seen = _pictures(model, heads, renderer, samples, batch_size=batch_size, progress=progress)
        words = _Words.of(renderer, [text for text, _ in owners], next(model.parameters()).device)
        texts = torch.cat([heads.read(*part) for part in words.parts(batch_size)])
        scores = similarity(seen.embeds, texts).float().cpu()
        reranked = None
        if "matching" in terms:
            to_text = _reranked(heads, seen, words, scores, by_text=False)
            to_image = _reranked(heads, seen, words, scores.T, by_text=True)
            reranked = PairScores(to_text, to_image.T, left, right)
        captions = returned = None
        if "caption" in terms:
            captions = _captions(heads, renderer, seen, batch_size=batch_size, options=options)
            spoken = _Words.of(renderer, captions, seen.embeds.device)
            heard = torch.cat([heads.read(*part) for part in spoken.parts(batch_size)])
            own = similarity(seen.embeds, heard).float().cpu()
            returned = PairScores(own, own, left, left)
    return JointFound(PairScores(scores, scores, left, right), reranked, captions, returned)


@dataclass(frozen=True)
class _Words:
    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, renderer: PairRenderer, texts: Sequence[str], device: Any) -> _Words:
        found = renderer.encode_texts(texts)
        ids = found["input_ids"].to(device)
        return cls(ids, found.get("attention_mask", torch.ones_like(ids)).to(device))

    def parts(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.ids), size):
            yield self.at(torch.arange(start, min(start + size, len(self.ids)), device=self.ids.device))

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows without the padding that none of them needs."""
        mask = self.mask[places]
        length = int(mask.sum(dim=1).max())
        return self.ids[places, :length], mask[:, :length]


def _pictures(
    model: nn.Module,
    heads: Heads,
    renderer: PairRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> Seen:
    first = next(model.parameters())
    dtype = getattr(model, "dtype", first.dtype)
    parts = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        parts.append(heads.see(renderer.encode_images(chosen)["pixel_values"].to(first.device, dtype)))
        if progress is not None:
            progress(len(chosen))
    return Seen(torch.cat([part.embeds for part in parts]), torch.cat([part.tokens for part in parts]))


def _reranked(heads: Heads, seen: Seen, words: _Words, scores: Tensor, *, by_text: bool) -> Tensor:
    """(queries, candidates) scores: log-odds above all cosines for the best few, cosines for the rest."""
    found = scores.clone()
    best = scores.topk(min(RERANKED, scores.shape[1]), dim=1).indices
    for query, candidates in enumerate(best):
        own = torch.full_like(candidates, query)
        pictures, texts = (candidates, own) if by_text else (own, candidates)
        device = seen.tokens.device
        odds = heads.match(seen.tokens[pictures.to(device)], *words.at(texts.to(device))).double().cpu()
        # tanh keeps the order and the bound; halves keep the least of them above a cosine of 1.
        found[query, candidates] = (3.0 + torch.tanh((odds[:, 1] - odds[:, 0]) / 8)).to(found.dtype)
    return found


def _captions(
    heads: Heads, renderer: PairRenderer, seen: Seen, *, batch_size: int, options: Mapping[str, Any]
) -> tuple[str, ...]:
    found: list[str] = []
    for tokens in seen.tokens.split(batch_size):
        ids = heads.speak(tokens, **options).tolist()
        ended = [row[: row.index(heads.end, 1)] if heads.end in row[1:] else row for row in ids]
        # The first token is the decoder's own start, in BLIP a word that the tokenizer may not know as special.
        texts = renderer.tokenizer.batch_decode([row[1:] for row in ended], skip_special_tokens=True)
        found += [text.strip() for text in texts]
    return tuple(found)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def score_joint(found: Mapping[str, Mapping[str, JointFound]], *, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """`headline`, `scores` and `sets` of the report from what each model says of each set, captions as texts left out.

    The headline is the embeddings' R@1 from picture to text.
    """
    whole = score_pairs(_of(found, "plain"), bootstrap_samples=bootstrap_samples, seed=seed)
    for name, ahead in (("reranked", "reranked_"), ("returned", "self_retrieval_")):
        chosen = _of(found, name)
        if not all(chosen.values()):
            continue
        part = score_pairs(chosen, bootstrap_samples=bootstrap_samples, seed=seed)
        for key, values in part["sets"].items():
            add_scores(whole["sets"][key], values, rename=_renamer(name, ahead))
    return whole


def _of(found: Mapping[str, Mapping[str, JointFound]], name: str) -> dict[str, dict[str, PairScores]]:
    return {
        model: {key: value for key, one in sets.items() if (value := getattr(one, name)) is not None}
        for model, sets in found.items()
    }


def _renamer(name: str, ahead: str) -> Callable[[str], str | None]:
    """Self-retrieval has one direction: a caption looks for its picture."""
    if name == "reranked":
        return lambda score: ahead + score
    return lambda score: ahead + score.removeprefix("text_to_image_") if score.startswith("text_to_image_") else None


def add_scores(whole: dict[str, Any], part: Mapping[str, Any], *, rename: Callable[[str], str | None]) -> None:
    """Put a set's scores and paired differences of `part` into those of `whole`, in place."""
    for model, scores in part["scores"].items():
        whole["scores"][model] |= {new: value for name, value in scores.items() if (new := rename(name)) is not None}
    for pair, values in part["paired"].items():
        into = whole["paired"][pair]["metrics"]
        for name, value in values["metrics"].items():
            if (new := rename(name)) is not None:
                into[new] = {**value, "metric": new}
