"""CIDEr-D (Vedantam et al. 2015), the variant of the COCO evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, check_rows, tokenize
from mmft.evaluation.metrics.ngrams import ORDER, Ngram, count_ngrams

_SIGMA = 6.0


@dataclass(frozen=True, slots=True)
class _Vector:
    """One text as tf-idf weights, their norm per n, and the length that the penalty looks at."""

    weights: dict[Ngram, float]
    norms: tuple[float, ...]
    length: int


class Cider(RowMetric):
    """Ten times the mean cosine of clipped tf-idf n-gram vectors, with a Gaussian penalty on the length difference.

    Document frequencies are counted over the references of *all rows given to `rows`*, and stay as they are when rows
    are grouped or resampled afterwards: a group's score is the mean of its rows' scores.
    """

    name = "cider"

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 1) in [0, 10]. With one row every idf is log 1 = 0, so the score is 0."""
        check_rows(self.name, predictions, references)
        counted = [[count_ngrams(tokenize(text).split()) for text in row] for row in references]
        frequency: Counter[Ngram] = Counter()
        for row in counted:
            frequency.update(set().union(*row))
        log_rows = math.log(len(counted)) if counted else 0.0
        out = np.zeros((len(predictions), 1))
        for index, (prediction, row) in enumerate(zip(predictions, counted, strict=True)):
            ours = _vector(count_ngrams(tokenize(prediction).split()), frequency, log_rows)
            theirs = [_vector(counts, frequency, log_rows) for counts in row]
            out[index, 0] = 10.0 * sum(_similarity(ours, other) for other in theirs) / len(theirs)
        return out


def _vector(counts: Counter[Ngram], frequency: Counter[Ngram], log_rows: float) -> _Vector:
    weights: dict[Ngram, float] = {}
    squares = [0.0] * ORDER
    length = 0
    for ngram, count in counts.items():
        weight = count * (log_rows - math.log(max(1.0, frequency[ngram])))
        weights[ngram] = weight
        squares[len(ngram) - 1] += weight * weight
        # The reference implementation takes the number of bigrams for the length; published scores contain that.
        length += count if len(ngram) == 2 else 0
    return _Vector(weights, tuple(math.sqrt(square) for square in squares), length)


def _similarity(ours: _Vector, theirs: _Vector) -> float:
    """Mean over n = 1..4 of the clipped cosine, times the length penalty."""
    dots = [0.0] * ORDER
    for ngram, weight in ours.weights.items():
        other = theirs.weights.get(ngram)
        if other is not None:
            dots[len(ngram) - 1] += min(weight, other) * other
    norms = [one * other for one, other in zip(ours.norms, theirs.norms, strict=True)]
    cosine = sum(dot / norm if norm else 0.0 for dot, norm in zip(dots, norms, strict=True)) / ORDER
    return cosine * math.exp(-((ours.length - theirs.length) ** 2) / (2 * _SIGMA**2))
