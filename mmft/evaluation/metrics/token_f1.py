"""Token F1 of SQuAD (Rajpurkar et al. 2016), the best over the references."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, best_of_references, check_rows

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokens(text: str) -> list[str]:
    """SQuAD's words: lower case, ASCII punctuation removed, English articles removed."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(prediction: str, reference: str) -> float:
    """2 P R / (P + R) over the bags of words; with no words on a side, 1 if both are empty and else 0 (SQuAD 2)."""
    ours, theirs = tokens(prediction), tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * shared / (len(ours) + len(theirs))


class TokenF1(RowMetric):
    """Mean over rows of the best token F1."""

    name = "token_f1"

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 1) in [0, 1]."""
        check_rows(self.name, predictions, references)
        return best_of_references(f1, predictions, references)
