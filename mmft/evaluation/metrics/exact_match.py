"""Share of rows whose answer is one of the references, letter case and spacing aside."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, best_of_references, check_rows


def normalize(text: str) -> str:
    """Unicode NFC, case-folded, runs of whitespace as one space, one closing full stop dropped."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text[:-1].rstrip() if text.endswith((".", "\u3002")) and not text.endswith("..") else text


class ExactMatch(RowMetric):
    """1 where the normalized prediction equals any normalized reference, else 0; the score is the mean."""

    name = "exact_match"
    binary = True

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 1) of 0.0 and 1.0."""
        check_rows(self.name, predictions, references)
        return best_of_references(lambda one, other: float(normalize(one) == normalize(other)), predictions, references)
