"""Classification with a dual encoder on rows that have a class: zero-shot by sentences, and a linear probe.

The class is a tag of the row. Zero-shot (`zero_shot`): the names of all classes go into the templates. Linear probe
(`linear_probe`): fitted on the training rows' embeddings, left out where no training row has the tag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.errors import DataError, choices
from mmft.evaluation.intervals import bootstrap_interval, paired_bootstrap
from mmft.evaluation.linear_probe import linear_probe
from mmft.evaluation.pairs import embed_media, embed_texts
from mmft.evaluation.retrieval import RatioMetric
from mmft.evaluation.scores import PAIRS
from mmft.evaluation.zero_shot import class_ranks, class_vectors
from mmft.seeds import fold

_TOPS = (1, 5)


@dataclass(frozen=True)
class ClassEmbeddings:
    """One model's vector of each class, and its embeddings of the training rows that have a class."""

    vectors: Tensor
    train: Tensor
    train_labels: tuple[int, ...]


def class_names(tag: str, train: Sequence[Sample], evals: Mapping[str, Sequence[Sample]]) -> list[str]:
    """The classes of all rows, sorted. Raises DataError for an evaluation set in which no row, or not every row, has
    one: a score over some rows would look like one over all."""
    for name, samples in evals.items():
        without = [sample for sample in samples if tag not in sample.tags]
        if without:
            raise DataError(
                f"{len(without)} of {len(samples)} rows of '{name}' have no tag {tag!r}",
                where=without[0].where or without[0].id,
                allowed=choices(sorted({key for sample in samples for key in sample.tags}), word=tag),
                do="give every row its class, or change evaluate.class_tag",
            )
    rows = [*train, *(sample for samples in evals.values() for sample in samples)]
    return sorted({sample.tags[tag] for sample in rows if tag in sample.tags})


def embed_classes(
    model: nn.Module,
    renderer: PairRenderer,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    train: Sequence[Sample],
    tag: str,
    batch_size: int,
) -> ClassEmbeddings:
    """What `score_classes` needs of a model."""

    def texts(prompts: list[str]) -> Tensor:
        return embed_texts(model, renderer, prompts, batch_size=batch_size)

    labelled = [sample for sample in train if tag in sample.tags]
    features = embed_media(model, renderer, labelled, batch_size=batch_size) if labelled else torch.zeros(0, 0)
    return ClassEmbeddings(
        vectors=class_vectors(texts, list(classes), templates=templates),
        train=features,
        train_labels=tuple(classes.index(sample.tags[tag]) for sample in labelled),
    )


def score_classes(
    pictures: Mapping[str, Tensor],
    found: Mapping[str, ClassEmbeddings],
    labels: Sequence[int],
    *,
    resamples: int,
    seed: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(scores by model and metric, differences by `first-second` and metric) on one set, both with intervals.

    Metrics: `zero_shot_top1`, `zero_shot_top5` (with more than five classes), `linear_probe_accuracy`.
    """
    stats = {model: _right(pictures[model], found[model], labels, seed=seed) for model in found}
    drawn = fold(seed, "classes")
    scores = {
        model: {
            name: bootstrap_interval(RatioMetric(name), rows, resamples=resamples, seed=drawn).as_dict()
            for name, rows in by_name.items()
        }
        for model, by_name in stats.items()
    }
    paired = {
        f"{first}-{second}": {
            name: paired_bootstrap(
                RatioMetric(name), rows, stats[second][name], resamples=resamples, seed=drawn
            ).as_dict()
            for name, rows in stats[first].items()
        }
        for first, second in PAIRS
        if {first, second} <= stats.keys()
    }
    return scores, paired


def _right(pictures: Tensor, found: ClassEmbeddings, labels: Sequence[int], *, seed: int) -> dict[str, np.ndarray]:
    """Metric -> (rows, 2): right or not, and 1."""
    wanted = torch.as_tensor(list(labels), dtype=torch.int64)
    ranks = class_ranks(pictures, found.vectors, wanted)
    right = {f"zero_shot_top{k}": ranks <= k for k in _TOPS if k < len(found.vectors)}
    if len(set(found.train_labels)) > 1:
        probe = linear_probe(found.train, found.train_labels, pictures, labels, resamples=1, seed=seed)
        right["linear_probe_accuracy"] = probe.predictions == np.asarray(labels)
    return {name: np.stack([rows, np.ones(len(rows))], axis=1).astype(np.float64) for name, rows in right.items()}
