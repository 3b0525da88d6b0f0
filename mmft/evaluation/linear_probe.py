"""Linear probe: how well a linear classifier does on frozen features (Radford et al. 2021, 3.2).

Multinomial logistic regression, `min over W, b of 1/2 |W|^2 + C sum cross-entropy(W x + b, y)`, the intercept free, on
features standardised by the training rows. scikit-learn solves it where it is installed, else torch's L-BFGS; the
problem is convex, so both find the same classifier. `C` is chosen on a fifth of the training rows and the classifier
trained again on all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.errors import DataError
from mmft.evaluation.intervals import Interval, bootstrap_interval
from mmft.evaluation.retrieval import RatioMetric
from mmft.seeds import fold

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """The probe's accuracy on the test rows, the `C` that was chosen, its predictions and the solver's name."""

    accuracy: Interval
    strength: float
    predictions: np.ndarray
    solver: str


def linear_probe(
    features: Tensor,
    labels: Sequence[int],
    test_features: Tensor,
    test_labels: Sequence[int],
    *,
    strengths: Sequence[float] = STRENGTHS,
    solver: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Probe:
    """Fit on `features` (n, width) and score on `test_features`; `solver` is `scikit-learn` or `torch`.

    Raises DataError for fewer than two classes, labels of the wrong number and features that are not finite.
    """
    solver = solver or ("scikit-learn" if importlib.util.find_spec("sklearn") else "torch")
    train_x, train_y = _checked(features, labels, "training")
    test_x, test_y = _checked(test_features, test_labels, "test")
    classes, targets = np.unique(train_y, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"the training rows have {len(classes)} class", do="give rows of at least two classes")
    mean, spread = train_x.mean(0), train_x.std(0)
    spread[spread == 0] = 1.0
    train_x, test_x = (train_x - mean) / spread, (test_x - mean) / spread
    strength = strengths[0]
    if len(strengths) > 1:
        strength = _chosen(train_x, targets, strengths, solver=solver, classes=len(classes), seed=seed)
    weights, bias = fit(train_x, targets, strength, solver=solver, classes=len(classes))
    predictions = classes[(test_x @ weights.T + bias).argmax(1)]
    stats = np.stack([predictions == test_y, np.ones(len(test_y))], axis=1).astype(np.float64)
    accuracy = bootstrap_interval(
        RatioMetric("accuracy"), stats, resamples=resamples, seed=fold(seed, "linear_probe", "rows")
    )
    return Probe(accuracy, strength, predictions, solver)


def fit(
    features: np.ndarray, targets: np.ndarray, strength: float, *, solver: str, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes, width) and intercepts (classes,) of the regression; `targets` are 0 ... classes - 1, each at
    least once."""
    if solver == "scikit-learn":
        from sklearn.linear_model import LogisticRegression

        found = LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=1e-6).fit(features, targets)
        weights, bias = np.asarray(found.coef_), np.asarray(found.intercept_)
        if classes == 2:  # scikit-learn's two classes share one row, which stands for the difference
            return np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        return weights, bias
    return _lbfgs(torch.from_numpy(features), torch.from_numpy(targets), strength, classes=classes)


def _lbfgs(x: Tensor, y: Tensor, strength: float, *, classes: int) -> tuple[np.ndarray, np.ndarray]:
    weights = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=_ITERATIONS, tolerance_grad=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        # Divided by the rows, so that the tolerance on the gradient does not depend on their number.
        entropy = F.cross_entropy(x @ weights.T + bias, y, reduction="sum")
        # With two classes scikit-learn penalises the length of the difference, which is half of both rows' length.
        penalty = weights.square().sum() * (1.0 if classes == 2 else 0.5)
        loss = (strength * entropy + penalty) / (strength * len(x))
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().numpy(), bias.detach().numpy()


def _chosen(
    features: np.ndarray, targets: np.ndarray, strengths: Sequence[float], *, solver: str, classes: int, seed: int
) -> float:
    """The strength with the best accuracy on a fifth of the rows (the first of equals); classes that would vanish from
    the rest stay in it."""
    order = np.random.default_rng(fold(seed, "linear_probe", "split")).permutation(len(targets))
    _, first = np.unique(targets[order], return_index=True)
    free = np.setdiff1d(np.arange(len(order)), first)[: len(order) // 5]
    held = order[free]
    kept = np.setdiff1d(np.arange(len(targets)), held)
    if not len(held):
        return strengths[0]
    scores = []
    for strength in strengths:
        weights, bias = fit(features[kept], targets[kept], strength, solver=solver, classes=classes)
        scores.append(float(((features[held] @ weights.T + bias).argmax(1) == targets[held]).mean()))
    return strengths[int(np.argmax(scores))]


def _checked(features: Tensor, labels: Sequence[int], what: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = features.detach().to("cpu", torch.float64).numpy(), np.asarray(labels)
    if x.ndim != 2 or len(x) != len(y) or not len(y):
        raise DataError(
            f"{what} features of shape {x.shape} with {len(y)} labels",
            allowed="(rows, width) and one label for each row",
            do="mend the labels",
        )
    if not np.isfinite(x).all():
        raise DataError(f"the {what} features are not finite", do="look at the rows they come from")
    return x, y
