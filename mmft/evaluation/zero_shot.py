"""Zero-shot classification with a dual encoder: a class is the mean of its name in several sentences.

    vectors = class_vectors(embed_texts, ["red fox", "truck"], templates=("a photo of a {}.", "a drawing of a {}."))
    zero_shot(pictures, vectors, labels)["top1"]                             # Interval

After Radford et al. 2021, 3.1.4: the embeddings of a class's prompts, each of length one, are averaged and brought to
length one again. A class that ties with the right one counts as better, to six decimals, as in `retrieval`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.errors import DataError
from mmft.evaluation.intervals import Interval, bootstrap_interval
from mmft.evaluation.retrieval import RatioMetric
from mmft.seeds import fold

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "an image of the {}.", "{}")
"""A few plain prompts; `{}` is the class's name."""
_DIGITS = 6
_ROWS = 4096


def class_vectors(
    embed_texts: Callable[[list[str]], Tensor],
    classes: Sequence[str | Sequence[str]],
    *,
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """(classes, width) vectors of length one; a class may have several names, each of which goes into every template.

    `embed_texts` gives (texts, width). Raises DataError for a template without `{}` or a class without a name.
    """
    wrong = next((template for template in templates if template.count("{}") != 1), None)
    if wrong is not None or not templates:
        raise DataError(
            f"template {wrong!r} has no place for the class" if wrong is not None else "no template is given",
            allowed="a sentence with {} where the class's name goes",
            do="write for example 'a photo of a {}.'",
        )
    vectors = []
    for number, given in enumerate(classes):
        names = [given] if isinstance(given, str) else list(given)
        if not names or not all(names):
            raise DataError("a class has no name", where=f"class {number}", do="give it one")
        prompts = [template.replace("{}", name) for name in names for template in templates]
        vectors.append(F.normalize(embed_texts(prompts).float(), dim=-1).mean(dim=0))
    return F.normalize(torch.stack(vectors), dim=-1)


def zero_shot(
    pictures: Tensor,
    vectors: Tensor,
    labels: Sequence[int],
    *,
    ks: Sequence[int] = (1, 5),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """`{"top1": ..., "top5": ...}`: shares of `pictures` (n, width) whose class is among the k nearest `vectors`.

    Raises DataError for a label that is no class, or labels of the wrong number.
    """
    wanted = torch.as_tensor(list(labels), dtype=torch.int64)
    bad = (wanted < 0) | (wanted >= len(vectors))
    if len(wanted) != len(pictures) or not len(wanted) or bool(bad.any()):
        raise DataError(
            f"label {int(wanted[bad][0])} is no class" if bool(bad.any()) else f"{len(wanted)} labels for the pictures",
            allowed=f"one of 0 to {len(vectors) - 1} for each of the {len(pictures)} pictures",
            do="mend the labels",
        )
    ranks = class_ranks(pictures, vectors, wanted)
    out = {}
    for k in ks:
        stats = np.stack([ranks <= k, np.ones(len(ranks))], axis=1).astype(np.float64)
        out[f"top{k}"] = bootstrap_interval(
            RatioMetric(f"top{k}"), stats, resamples=resamples, seed=fold(seed, "zero_shot")
        )
    return out


def class_ranks(pictures: Tensor, vectors: Tensor, labels: Tensor) -> np.ndarray:
    """(n,) rank of each picture's class: 1 + the other classes that are as near or nearer."""
    vectors = vectors.detach().double()
    ranks = []
    for start in range(0, len(pictures), _ROWS):
        scores = (pictures[start : start + _ROWS].detach().double() @ vectors.T).round(decimals=_DIGITS)
        own = scores.gather(1, labels[start : start + _ROWS, None])
        ranks.append((scores >= own).sum(dim=1))  # the class itself is the 1
    return torch.cat(ranks).cpu().numpy()
