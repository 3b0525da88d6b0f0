"""Corpus BLEU (Papineni et al. 2002) with the COCO tools' choices: closest reference length, no smoothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, check_rows, tokenize
from mmft.evaluation.metrics.ngrams import ORDER, Ngram, count_ngrams

# The COCO scorer's guards against 0/0, kept so that the numbers agree to the last digit.
_TINY, _SMALL = 1e-15, 1e-9


class Bleu(RowMetric):
    """BLEU-`order`, 4 by default; `score` of that also gives BLEU-1 to BLEU-3.

    A row's statistics: [answer length, closest reference length, n-grams guessed (1..4), n-grams correct (1..4)].
    """

    name = "bleu"

    def __init__(self, order: int = ORDER) -> None:
        self.order = order
        self.name = "bleu" if order == ORDER else f"bleu_{order}"

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 10) of counts."""
        check_rows(self.name, predictions, references)
        out = np.zeros((len(predictions), 2 + 2 * ORDER))
        for index, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
            words = tokenize(prediction).split()
            others = [tokenize(reference).split() for reference in row]
            allowed: Counter[Ngram] = Counter()
            for other in others:
                allowed |= count_ngrams(other)
            out[index, 0] = len(words)
            out[index, 1] = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
            out[index, 2 : 2 + ORDER] = [max(0, len(words) - size) for size in range(ORDER)]
            for ngram, count in count_ngrams(words).items():
                out[index, 1 + ORDER + len(ngram)] += min(count, allowed[ngram])
        return out

    def finish(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """BLEU of this order, shape (...), from summed counts (..., 10)."""
        return self.orders(sums)[..., self.order - 1]

    def orders(self, sums: np.ndarray) -> np.ndarray:
        """BLEU-1 .. BLEU-4, (..., 4): geometric mean of the precisions times exp(1 - reference / answer) if shorter."""
        guess, correct = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
        logs = np.cumsum(np.log((correct + _TINY) / (guess + _SMALL)), axis=-1) / np.arange(1, ORDER + 1)
        ratio = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
        # An empty answer has a ratio of about 1e-15: exp(-1e15) is 0, as it should be.
        return np.exp(logs + np.minimum(0.0, 1.0 - 1.0 / np.maximum(ratio, _TINY))[..., None])

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """`bleu` (which is BLEU-4) and `bleu_1` .. `bleu_4`; of another order, that alone."""
        stats = self.rows(predictions, references)
        if self.order != ORDER:
            return {self.name: self.aggregate(stats)}
        values = self.orders(stats.sum(axis=0))
        named = {f"bleu_{size}": float(value) for size, value in enumerate(values, start=1)}
        return {self.name: self.aggregate(stats), **named}
