"""Classification, ordinal and regression metrics over class numbers and probabilities, equal to scikit-learn's.

As for text metrics a score is a formula over sums of per-row statistics, so that resampling is exact and cheap. What
happens at the edges, everywhere: a class that occurs neither in the references nor in the predictions has no say in a
macro mean; a ratio 0/0 of a class that does is 0; a score without any meaning (no class with both kinds of rows for
ROC-AUC, one class only for kappa) is NaN, and draws of the bootstrap that come out so are left out and counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmft.errors import DataError

BINS = 15
"""Equal-width bins of the calibration error (Guo et al. 2017)."""


@dataclass(frozen=True)
class Answers:
    """Predictions and references of one set, checked: `truth` (N,) int, or (N, C) 0/1 for several labels per row;
    `decisions` of the same shape; `chances` (N, C) or None where only decisions were given."""

    truth: np.ndarray
    decisions: np.ndarray
    chances: np.ndarray | None
    classes: int

    @property
    def multi_label(self) -> bool:
        """True when rows may have several labels."""
        return self.truth.ndim == 2

    @property
    def hot(self) -> tuple[np.ndarray, np.ndarray]:
        """Truth and decisions as (N, C) of 0.0 and 1.0."""
        if self.multi_label:
            return self.truth.astype(np.float64), self.decisions.astype(np.float64)
        eye = np.eye(self.classes)
        return eye[self.truth], eye[self.decisions]


def classify(predictions: Any, references: Any, *, classes: int | None = None) -> Answers:
    """Check and join. predictions: class numbers (N,), probabilities (N, C), or 0/1 (N, C) with (N, C) references;
    references: class numbers (N,), or 0/1 (N, C). Decisions are the largest probability (the first of equal ones), or
    probabilities above 0.5. `classes` is the declared number; otherwise the width of the probabilities, or the
    largest number that occurs.

    Raises DataError, with the row, for unequal lengths, no rows, a number outside of the declared classes, and
    probabilities outside of [0, 1] or not finite, or that do not sum to 1 (within 1e-4) for one label per row.
    """
    given, truth = np.asarray(predictions), np.asarray(references)
    if len(given) != len(truth) or len(truth) == 0:
        raise DataError(
            f"{len(given)} predictions for {len(truth)} references",
            allowed="as many predictions as references, at least one",
            do="give one prediction per reference",
        )
    wide = given.ndim == 2
    if given.ndim > 2 or truth.ndim > 2 or (truth.ndim == 2 and given.shape != truth.shape):
        raise DataError(
            f"predictions of shape {given.shape} for references of shape {truth.shape}",
            allowed="(N,) or (N, C) for (N,); (N, C) for (N, C)",
            do="mend the shapes",
        )
    if classes is None:
        classes = given.shape[1] if wide else int(max(given.max(), truth.max())) + 1
    chances = None
    if wide:
        chances = given.astype(np.float64)
        _check_chances(chances, classes, one_label=truth.ndim == 1)
        decisions = (chances > 0.5).astype(np.int64) if truth.ndim == 2 else chances.argmax(axis=1)
    else:
        decisions = _numbers(given, classes, "prediction")
    truth = _numbers(truth, 2 if truth.ndim == 2 else classes, "reference")
    return Answers(truth, decisions, chances, classes)


def _numbers(values: np.ndarray, classes: int, what: str) -> np.ndarray:
    wrong = ~np.isfinite(values.astype(np.float64)) | (values != np.floor(values)) | (values < 0) | (values >= classes)
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise DataError(
            f"the {what} {values[wrong].flat[0]} is no declared class",
            where=f"row {row}",
            allowed=f"0 to {classes - 1}",
            do="mend it, or declare the class",
        )
    return values.astype(np.int64)


def _check_chances(chances: np.ndarray, classes: int, *, one_label: bool) -> None:
    if chances.shape[1] != classes:
        raise DataError(f"{chances.shape[1]} probabilities per row for {classes} classes", do="give one per class")
    wrong = ~np.isfinite(chances).all(axis=1) | (chances < 0).any(axis=1) | (chances > 1).any(axis=1)
    if one_label:
        wrong |= np.abs(chances.sum(axis=1) - 1) > 1e-4
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{np.round(chances[row], 4).tolist()} are no probabilities",
            where=f"row {row}",
            allowed="finite, in [0, 1]" + (", summing to 1" if one_label else ""),
            do="give the softmax (or sigmoids), not the logits",
        )


class ClassMetric(ABC):
    """A score as a formula over summed row statistics."""

    name: str
    higher_is_better: bool = True
    binary: bool = False
    """Every row's statistic is 0 or 1 (an exact paired test exists)."""

    @abstractmethod
    def stats(self, answers: Answers) -> np.ndarray:
        """(N, K) float64."""

    @abstractmethod
    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """Scores (...) of sums (..., K) over `rows` rows drawn from `answers`."""

    def score(self, answers: Answers) -> float:
        """The score of the whole set."""
        return float(self.finish(self.stats(answers).sum(axis=0), len(answers.truth), answers))


class Accuracy(ClassMetric):
    """Share of rows decided right; of several labels, all of them (subset accuracy)."""

    name, binary = "accuracy", True

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 1)."""
        same = answers.truth == answers.decisions
        return (same.all(axis=1) if answers.multi_label else same).astype(np.float64)[:, None]

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """A mean."""
        return sums[..., 0] / rows


class _Counted(ClassMetric):
    """Scores of per-class counts: hits, rows of the class, decisions for it; each (..., C)."""

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 3 C)."""
        truth, decided = answers.hot
        return np.concatenate((truth * decided, truth, decided), axis=1)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """By `of_counts`."""
        hits, real, decided = np.split(sums, 3, axis=-1)
        return self.of_counts(hits, real, decided)

    @abstractmethod
    def of_counts(self, hits: np.ndarray, real: np.ndarray, decided: np.ndarray) -> np.ndarray:
        """(..., C) three times -> (...)."""


class BalancedAccuracy(_Counted):
    """Mean recall of the classes that the references hold (Brodersen et al. 2010)."""

    name = "balanced_accuracy"

    def of_counts(self, hits: np.ndarray, real: np.ndarray, decided: np.ndarray) -> np.ndarray:
        """(...)."""
        return _mean(_ratio(hits, real), real > 0)


class Averaged(_Counted):
    """Precision, recall or F1. macro: the mean over classes that references or predictions hold; micro: of the counts
    of all classes together (with one label per row all three are the accuracy)."""

    def __init__(self, average: str, kind: str) -> None:
        self.average, self.kind, self.name = average, kind, f"{average}_{kind}"

    def of_counts(self, hits: np.ndarray, real: np.ndarray, decided: np.ndarray) -> np.ndarray:
        """(...)."""
        present = real + decided > 0
        if self.average == "micro":
            hits, real, decided = (x.sum(axis=-1, keepdims=True) for x in (hits, real, decided))
            present = np.ones_like(hits, dtype=bool)
        if self.kind == "f1":
            return _mean(_ratio(2 * hits, real + decided), present)
        return _mean(_ratio(hits, decided if self.kind == "precision" else real), present)


class LogLoss(ClassMetric):
    """Mean of `-log p(truth)`, p held in [eps, 1 - eps] of float64 as scikit-learn does; with several labels per row
    the mean over rows and classes of the binary one."""

    name, higher_is_better = "log_loss", False

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 1)."""
        eps = np.finfo(np.float64).eps
        chances = np.clip(_chances(self, answers), eps, 1 - eps)
        truth = answers.hot[0]
        if answers.multi_label:
            return -(truth * np.log(chances) + (1 - truth) * np.log(1 - chances)).mean(axis=1, keepdims=True)
        return -(truth * np.log(chances)).sum(axis=1, keepdims=True)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """A mean."""
        return sums[..., 0] / rows


class CalibrationError(ClassMetric):
    """Expected calibration error (Guo et al. 2017): rows in `BINS` equal-width bins ((i/15, (i+1)/15], 0 in the first)
    of their largest probability; `sum_b |B_b| / N |accuracy(B_b) - mean probability(B_b)|`. With several labels per row
    every (row, class) is an entry with its probability, right where the class is true."""

    name, higher_is_better = "ece", False

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 3 BINS): per bin entries, right ones, summed probability."""
        chances = _chances(self, answers)
        if answers.multi_label:
            right = answers.truth.astype(np.float64)
        else:
            right = (answers.decisions == answers.truth).astype(np.float64)[:, None]
            chances = chances.max(axis=1, keepdims=True)
        bins = np.clip(np.ceil(chances * BINS).astype(int) - 1, 0, BINS - 1)
        out = np.zeros((len(chances), 3, BINS))
        rows = np.arange(len(chances))[:, None].repeat(chances.shape[1], axis=1)
        for place, value in enumerate((np.ones_like(chances), right, chances)):
            np.add.at(out[:, place], (rows, bins), value)
        return out.reshape(len(chances), -1)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """(...)."""
        entries, right, chance = np.split(sums, 3, axis=-1)
        return np.abs(right - chance).sum(axis=-1) / entries.sum(axis=-1)


class QuadraticKappa(ClassMetric):
    """Cohen's kappa with quadratic weights (Cohen 1968) of ordered classes: `1 - sum w O / sum w E`, `w = (i - j)^2`, O
    the confusion matrix, E the product of its margins over N. NaN where both are one class only."""

    name = "quadratic_kappa"

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, C * C)."""
        truth, decided = answers.hot
        return (truth[:, :, None] * decided[:, None, :]).reshape(len(truth), -1)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """(...)."""
        size = answers.classes
        table = sums.reshape(*sums.shape[:-1], size, size)
        weights = (np.arange(size)[:, None] - np.arange(size)) ** 2
        expected = table.sum(axis=-1)[..., :, None] * table.sum(axis=-2)[..., None, :] / rows
        below = (weights * expected).sum(axis=(-1, -2))
        above = (weights * table).sum(axis=(-1, -2))
        return np.where(below > 0, 1 - above / np.where(below > 0, below, 1), np.nan)


def confusion_matrix(answers: Answers) -> np.ndarray:
    """(C, C) of counts, row = truth, column = decision; with several labels per row (C, 2, 2), one per class."""
    if answers.multi_label:
        return np.stack(
            [
                confusion_matrix(Answers(answers.truth[:, c], answers.decisions[:, c], None, 2))
                for c in range(answers.classes)
            ]
        )
    flat = answers.truth * answers.classes + answers.decisions
    return np.bincount(flat, minlength=answers.classes**2).reshape(answers.classes, answers.classes)


def reliability(answers: Answers) -> dict[str, np.ndarray]:
    """The bins behind the calibration error, for a plot: `count`, `accuracy` and `confidence`, each (BINS,), NaN where
    a bin is empty."""
    count, right, chance = np.split(CalibrationError().stats(answers).sum(axis=0), 3)
    safe = np.where(count > 0, count, np.nan)
    return {"count": count.astype(int), "accuracy": right / safe, "confidence": chance / safe}


def _chances(metric: ClassMetric, answers: Answers) -> np.ndarray:
    if answers.chances is None:
        raise DataError(
            f"{metric.name} needs probabilities, and only decisions were given", do="give probabilities of shape (N, C)"
        )
    return answers.chances


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where below is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), 0.0)


def _mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is counted; NaN where nothing is."""
    number = counted.sum(axis=-1)
    return np.where(number > 0, (values * counted).sum(axis=-1) / np.where(number > 0, number, 1), np.nan)
