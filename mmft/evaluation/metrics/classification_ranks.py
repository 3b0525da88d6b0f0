"""Metrics of rankings (areas under curves), and of numbers (ordinal classes and regression)."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmft.errors import DataError
from mmft.evaluation.metrics.classification import Answers, ClassMetric, _chances


class _Area(ClassMetric):
    """One-vs-rest: the mean over classes of the area under a curve of "how likely is this class". Equal scores are one
    threshold. A draw of the bootstrap is a vector of row counts, hence N columns: price O(draws N (N + C))."""

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, N), the identity."""
        _chances(self, answers)
        return np.eye(len(answers.truth))

    def score(self, answers: Answers) -> float:
        """Of the whole set: every row counts once."""
        _chances(self, answers)
        return float(self.finish(np.ones(len(answers.truth)), len(answers.truth), answers))

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """(...) from counts (..., N); classes without a meaningful area are left out, NaN where all are."""
        areas = self.each(sums, answers)
        known = ~np.isnan(areas)
        number = known.sum(axis=-1)
        return np.where(number > 0, np.where(known, areas, 0.0).sum(axis=-1) / np.maximum(number, 1), np.nan)

    def each(self, counts: np.ndarray, answers: Answers) -> np.ndarray:
        """The area of every class, (..., C), of rows that count (..., N) times."""
        chances, truth = _chances(self, answers), answers.hot[0]
        return np.stack([self.area(chances[:, c], truth[:, c], counts) for c in range(answers.classes)], axis=-1)

    def area(self, scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(...) of one class: scores (N,), truth (N,) 0/1, counts (..., N)."""
        raise NotImplementedError


class RocAuc(_Area):
    """Area under the ROC curve (Hanley & McNeil 1982): the chance that a row of the class scores above one that is not,
    equal scores half. Classes without rows of both kinds are left out."""

    name = "roc_auc"

    def area(self, scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(...)."""
        right, wrong = _curve(scores, truth, counts)
        total = right[..., -1] * wrong[..., -1]
        steps = np.diff(wrong, axis=-1, prepend=0.0)
        middle = right - np.diff(right, axis=-1, prepend=0.0) / 2
        return np.where(total > 0, (steps * middle).sum(axis=-1) / np.where(total > 0, total, 1), np.nan)


class PrAuc(_Area):
    """Average precision, `sum_k (R_k - R_{k-1}) P_k` over thresholds, the area under the precision-recall steps without
    interpolation. Classes without a row are left out."""

    name = "pr_auc"

    def area(self, scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(...)."""
        right, wrong = _curve(scores, truth, counts)
        total = right[..., -1]
        taken = right + wrong
        precision = right / np.where(taken > 0, taken, 1)
        gained = np.diff(right, axis=-1, prepend=0.0)
        return np.where(total > 0, (gained * precision).sum(axis=-1) / np.where(total > 0, total, 1), np.nan)


def _curve(scores: np.ndarray, truth: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the class and others at or above each distinct score, falling: (..., thresholds) twice."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    ordered = counts[..., order]
    right, wrong = ordered * truth[order], ordered * (1 - truth[order])
    return right.cumsum(axis=-1)[..., ends], wrong.cumsum(axis=-1)[..., ends]


def roc_curve(answers: Answers, label: int) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of one class against the rest, from (0, 0) to (1, 1); NaN without both kinds."""
    chances = answers.chances
    if chances is None:
        raise DataError("a ROC curve needs probabilities", do="give probabilities of shape (N, C)")
    right, wrong = _curve(chances[:, label], answers.hot[0][:, label], np.ones(len(chances)))
    with np.errstate(invalid="ignore"):
        return np.append(0.0, wrong / wrong[-1]), np.append(0.0, right / right[-1])


def measure(predictions: Any, references: Any) -> Answers:
    """Numbers (N,), or (N, T) with T targets, for `MeanAbsoluteError`, `RootMeanSquaredError` and `R2`; ordered classes
    go by their number. Raises DataError for unequal shapes, no rows, and numbers that are not finite."""
    found, truth = (np.asarray(x, dtype=np.float64) for x in (predictions, references))
    if found.shape != truth.shape or len(truth) == 0:
        raise DataError(
            f"predictions of shape {found.shape} for references of shape {truth.shape}",
            allowed="equal shapes with at least one row",
            do="mend the shapes",
        )
    for name, values in (("prediction", found), ("reference", truth)):
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise DataError(f"a {name} is not finite", where=f"row {row}", do="leave the row out, or mend it")
    shape = (len(truth), -1)
    return Answers(truth.reshape(shape), found.reshape(shape), None, truth.reshape(shape).shape[1])


class MeanAbsoluteError(ClassMetric):
    """Mean of |prediction - reference| over rows and targets."""

    name, higher_is_better = "mae", False

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 1)."""
        return np.abs(answers.decisions - answers.truth).mean(axis=1, keepdims=True)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """A mean."""
        return sums[..., 0] / rows


class RootMeanSquaredError(ClassMetric):
    """Root of the mean squared error of each target, then the mean over targets."""

    name, higher_is_better = "rmse", False

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, T)."""
        return (answers.decisions - answers.truth) ** 2

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """(...)."""
        return np.sqrt(sums / rows).mean(axis=-1)


class R2(ClassMetric):
    """`1 - sum (y - f)^2 / sum (y - mean y)^2` of each target, then the mean over targets. Of a constant target: 1 for
    a perfect prediction, else 0. NaN for one row."""

    name = "r2"

    def stats(self, answers: Answers) -> np.ndarray:
        """(N, 3 T): squared error, reference and its square, the references shifted to mean 0 (which changes nothing
        but keeps the digits)."""
        centred = answers.truth - answers.truth.mean(axis=0)
        return np.concatenate(((answers.decisions - answers.truth) ** 2, centred, centred**2), axis=1)

    def finish(self, sums: np.ndarray, rows: int, answers: Answers) -> np.ndarray:
        """(...)."""
        error, total, squares = np.split(sums, 3, axis=-1)
        spread = squares - total**2 / rows
        # A draw of equal rows leaves rounding of the squares behind.
        constant = spread <= 1e-13 * squares
        scores = 1 - error / np.where(constant, 1, spread)
        scores = np.where(constant, (error == 0).astype(np.float64), scores).mean(axis=-1)
        return np.full_like(scores, np.nan) if rows < 2 else scores
