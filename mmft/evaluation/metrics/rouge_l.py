"""ROUGE-L (Lin 2004) with the COCO tools' choices: beta 1.2, best precision and best recall over the references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, check_rows, tokenize

_BETA_SQUARED = 1.2**2


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): O(len(other)) operations on big integers."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(one) - row.bit_count()


def rouge(prediction: str, references: Sequence[str]) -> float:
    """(1 + b²) P R / (R + b² P) of tokenized texts, P and R the best over the references."""
    # Splitting at the single space turns an empty text into one empty word, as the COCO tools do: no 0/0.
    ours = prediction.split(" ")
    shared = [(common_subsequence(theirs, ours), len(theirs)) for theirs in (row.split(" ") for row in references)]
    precision = max(common for common, _ in shared) / len(ours)
    recall = max(common / length for common, length in shared)
    if precision == 0.0 or recall == 0.0:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


class RougeL(RowMetric):
    """Mean over rows of ROUGE-L."""

    name = "rouge_l"

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 1) in [0, 1]."""
        check_rows(self.name, predictions, references)
        values = [
            rouge(tokenize(one), [tokenize(reference) for reference in row])
            for one, row in zip(predictions, references, strict=True)
        ]
        return np.asarray(values, dtype=np.float64).reshape(-1, 1)
