"""What a metric is here: statistics per row, and one formula over their sums.

A score of a whole set is `finish(sum of the rows' statistics, number of rows)`. That form holds for means (one column)
and for corpus scores such as BLEU (counts), and it makes the bootstrap exact and cheap: a resample is a weighted sum
of rows, no text is looked at twice.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmft.errors import DataError


class RowMetric(ABC):
    """A metric of predictions against one or more references per row."""

    name: str
    higher_is_better: bool = True
    binary: bool = False
    """Every row's statistic is 0 or 1 (an exact paired test exists)."""

    @abstractmethod
    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Statistics of each row, (N, K) float64. Raises DataError for unequal lengths or a row without references."""

    def finish(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """Scores, shape (...), from sums over `rows` rows, shape (..., K). A mean of the first column by default."""
        return sums[..., 0] / rows

    def aggregate(self, stats: np.ndarray) -> float:
        """The score of the rows in `stats` (N, K); N must be at least 1."""
        if len(stats) == 0:
            raise DataError(f"{self.name}: no rows to score", do="give the evaluation set at least one row")
        return float(self.finish(stats.sum(axis=0), len(stats)))

    def each(self, stats: np.ndarray) -> np.ndarray:
        """The score of every row by itself, (N,)."""
        return self.finish(stats, 1)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """The score(s) of a set by name, as `evaluate.Metric.compute` returns them."""
        return {self.name: self.aggregate(self.rows(predictions, references))}


def check_rows(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise DataError unless each prediction has at least one reference."""
    if len(predictions) != len(references):
        raise DataError(
            f"{name}: {len(predictions)} predictions but {len(references)} rows of references",
            do="give one list of references per prediction",
        )
    for index, row in enumerate(references):
        if isinstance(row, str) or len(row) == 0:
            raise DataError(
                f"{name}: the references of a row must be a non-empty list of texts, not {row!r}",
                where=f"row {index}",
                do="give every evaluation row an answer, or leave the row out",
            )


def best_of_references(score, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """`max over references of score(prediction, reference)` per row, (N, 1)."""
    values = [
        max(score(prediction, reference) for reference in row)
        for prediction, row in zip(predictions, references, strict=True)
    ]
    return np.asarray(values, dtype=np.float64).reshape(-1, 1)


@lru_cache(maxsize=65536)
def _kind(char: str) -> str:
    """`word`, `alone` (a token by itself: ideographs, kana, emoji), `inner` (kept between word characters) or `gap`."""
    category = unicodedata.category(char)
    code = ord(char)
    if 0x3040 <= code <= 0x30FF or 0x3400 <= code <= 0x9FFF or 0x20000 <= code <= 0x3FFFF or category == "So":
        return "alone"
    if category[0] in "LMN":
        return "word"
    return "inner" if char in "'\u2019-." else "gap"


def tokenize(text: str) -> str:
    """Tokens of a caption joined by single spaces: what CIDEr, BLEU and ROUGE-L count.

    Unicode NFC, lower case; a token is a run of letters, marks and digits, with apostrophes, hyphens and points kept
    inside it (`don't`, `t-shirt`, `3.5`); an ideograph, a kana or an emoji is a token of its own; all else is dropped.
    The COCO tools use the Penn Treebank tokenizer (Java), which differs on clitics (`do n't`): on text that is already
    tokenized the scores here equal theirs, on raw English they differ in the third decimal.
    """
    text = unicodedata.normalize("NFC", text).lower()
    kinds = [_kind(char) for char in text]
    out: list[str] = []
    for index, (char, kind) in enumerate(zip(text, kinds, strict=True)):
        inside = 0 < index < len(text) - 1 and kinds[index - 1] == "word" and kinds[index + 1] == "word"
        if kind == "word" or (kind == "inner" and inside):
            out.append("'" if char == "\u2019" else char)
        else:
            out.append(f" {char} " if kind == "alone" else " ")
    return " ".join("".join(out).split())
