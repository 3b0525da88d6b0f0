"""Evaluation of a dual encoder on sets of pairs: embeddings of each model, retrieval scores, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmft.data.pairs import PairRenderer, group_of
from mmft.data.sample import Sample
from mmft.evaluation.retrieval import Direction, compare, retrieve
from mmft.evaluation.scores import PAIRS
from mmft.objectives.contrastive_embed import Side, embed, sides
from mmft.seeds import fold


def headline(both: tuple[Side, Side]) -> str:
    """The score that stands for a run: R@1 from pictures (or sounds) to texts."""
    return f"{both[0]}_to_{both[1]}_r@1"


@dataclass(frozen=True)
class PairEmbeddings:
    """Vectors of length one on the CPU in float32, with the number of the group of each row."""

    left: Tensor
    right: Tensor
    left_groups: tuple[int, ...]
    right_groups: tuple[int, ...]
    sides: tuple[Side, Side] = ("image", "text")

    def directions(self, *, resamples: int, seed: int) -> dict[str, Direction]:
        """Retrieval both ways by cosine."""
        groups: Any = {"left_groups": self.left_groups, "right_groups": self.right_groups}
        return retrieve(self.left, self.right, **groups, names=self.sides, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class PairScores:
    """Scores of every picture with every text, on the CPU: `to_text` (n, m) ranks the texts of a picture, `to_image`
    (n, m) the pictures of a text. Price: two n * m matrices in memory."""

    to_text: Tensor
    to_image: Tensor
    left_groups: tuple[int, ...]
    right_groups: tuple[int, ...]
    sides: tuple[Side, Side] = ("image", "text")

    def directions(self, *, resamples: int, seed: int) -> dict[str, Direction]:
        """Retrieval both ways by these scores."""
        groups: Any = {"left_groups": self.left_groups, "right_groups": self.right_groups}
        found = {}
        for way, scores in (("image_to_text", self.to_text), ("text_to_image", self.to_image)):
            # The product with the identity gives the scores themselves.
            same = torch.eye(scores.shape[1], dtype=scores.dtype)
            found[way] = retrieve(scores, same, **groups, resamples=resamples, seed=seed)[way]
        return found


def embed_pairs(
    model: nn.Module,
    renderer: PairRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> PairEmbeddings:
    """Embeddings of the samples' pictures (or sounds) and of all their texts; hard negatives are texts of no group.

    Each text is embedded once, however many pictures share it. The model is put into eval() and back.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(map(group_of, samples)))}
    owners = [(text, numbers[group_of(one)]) for one in samples for text in one.answers]
    owners += [(text, -1) for one in samples for text in one.negatives]
    texts = list(dict.fromkeys(text for text, _ in owners))
    left = embed_media(model, renderer, samples, batch_size=batch_size, progress=progress)
    words = embed_texts(model, renderer, texts, batch_size=batch_size)
    place = {text: number for number, text in enumerate(texts)}
    return PairEmbeddings(
        left=left,
        right=words[[place[text] for text, _ in owners]],
        left_groups=tuple(numbers[group_of(one)] for one in samples),
        right_groups=tuple(group for _, group in owners),
        sides=sides(model),
    )


def embed_media(
    model: nn.Module,
    renderer: PairRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """(rows, width) embeddings of the samples' pictures or sounds; the model is put into eval() and back."""
    found = []
    for start in range(0, len(samples), batch_size):
        chosen = samples[start : start + batch_size]
        found.append(_embedded(model, renderer.encode_media(chosen), sides(model)[0]))
        if progress is not None:
            progress(len(chosen))
    return torch.cat(found)


def embed_texts(model: nn.Module, renderer: PairRenderer, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """(texts, width) embeddings; the model is put into eval() and back."""
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return torch.cat([_embedded(model, renderer.encode_texts(part), sides(model)[1]) for part in parts])


@torch.no_grad()
def _embedded(model: nn.Module, inputs: Mapping[str, Tensor], side: Side) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    device, dtype = next(model.parameters()).device, model.dtype
    placed = {key: value.to(device) for key, value in inputs.items()}
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in placed.items()}  # type: ignore[arg-type]
    model.eval()
    try:
        return embed(model, cast, side).float().cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode


def score_pairs(
    found: Mapping[str, Mapping[str, PairEmbeddings | PairScores]], *, bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """`headline`, `scores` and `sets` of the report from embeddings by model and set.

    Scores are named `image_to_text_r@1`, ..., `text_to_image_map` (`audio_to_text_...` for sounds); `ranks` holds the
    median ranks. All models of a set are resampled by the same draws.
    """
    names = next(iter(found.values())).keys()
    sets = {
        name: _score_set(
            {model: embedded[name] for model, embedded in found.items()},
            resamples=bootstrap_samples,
            seed=fold(seed, "pairs", name),
        )
        for name in names
    }
    first = next(iter(next(iter(found.values())).values()))
    return {"headline": headline(first.sides), "scores": next(iter(sets.values()))["scores"], "sets": sets}


def _score_set(models: Mapping[str, PairEmbeddings | PairScores], *, resamples: int, seed: int) -> dict[str, Any]:
    directions = {model: one.directions(resamples=resamples, seed=seed) for model, one in models.items()}
    scores: dict[str, dict[str, Any]] = {model: {} for model in models}
    ranks: dict[str, dict[str, Any]] = {model: {} for model in models}
    for model, both in directions.items():
        for way, direction in both.items():
            for name, interval in direction.scores.items():
                kept = ranks if name == "median_rank" else scores
                kept[model][f"{way}_{name}"] = interval.as_dict()
    paired: dict[str, Any] = {}
    for first, second in PAIRS:
        if {first, second} <= models.keys():
            metrics = {
                f"{way}_{name}": {**value.as_dict(), "metric": f"{way}_{name}"}
                for way in directions[first]
                for name, value in compare(
                    directions[first][way], directions[second][way], resamples=resamples, seed=seed
                ).items()
            }
            paired[f"{first}-{second}"] = {**metrics[headline(models[first].sides)], "metrics": metrics}
    rows = len(next(iter(models.values())).left_groups)
    return {"rows": rows, "scores": scores, "ranks": ranks, "paired": paired, "groups": {}}


def largest_difference(one: PairEmbeddings, other: PairEmbeddings) -> float:
    """Largest difference of a component of the two models' vectors, which have length one."""
    values = [float((a - b).abs().max()) for a, b in ((one.left, other.left), (one.right, other.right))]
    return max(values)
