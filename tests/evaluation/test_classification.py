"""Classification metrics against scikit-learn within 1e-9, edges by hand, intervals against explicit resampling."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from mmft.errors import DataError, RecipeError
from mmft.evaluation.intervals import resampled_sums
from mmft.evaluation.metrics import load_metric
from mmft.evaluation.metrics.classification import BINS, classify, confusion_matrix, reliability
from mmft.evaluation.metrics.classification_intervals import CLASS_METRICS, class_difference, class_interval
from mmft.evaluation.metrics.classification_ranks import measure, roc_curve

sk = pytest.importorskip("sklearn.metrics", reason="extra: test")
NUMBERS = ("mae", "rmse", "r2")
CLOSE = {"abs": 1e-9, "nan_ok": True}


def drawn(seed: int, rows: int = 120, classes: int = 4, *, ties: bool = False):
    """Softmax of noise that leans to the truth; rounded where ties are wanted."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[truth]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        chances = np.maximum(np.round(chances * 5), 0) + 0.2
        chances /= chances.sum(axis=1, keepdims=True)
        chances = np.round(chances, 6)  # equal scores are equal to the last digit
    return truth, chances


def reference(name: str, truth, chances, classes: int) -> float:
    """What scikit-learn says; one class against the rest by itself where it refuses a set as a whole."""
    decided = chances.argmax(axis=1)
    hot = np.eye(classes)[truth]
    average, _, kind = name.partition("_")
    if average in ("macro", "micro"):
        score = {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}[kind]
        return score(truth, decided, average=average, zero_division=0)
    if name == "roc_auc":
        both = [c for c in range(classes) if 0 < hot[:, c].sum() < len(hot)]
        return float(np.mean([sk.roc_auc_score(hot[:, c], chances[:, c]) for c in both])) if both else math.nan
    if name == "pr_auc":
        there = [c for c in range(classes) if hot[:, c].sum()]
        return float(np.mean([sk.average_precision_score(hot[:, c], chances[:, c]) for c in there]))
    if name == "log_loss":
        return sk.log_loss(truth, chances, labels=range(classes))
    if name == "quadratic_kappa":
        return sk.cohen_kappa_score(truth, decided, weights="quadratic", labels=range(classes))
    plain = {"accuracy": sk.accuracy_score, "balanced_accuracy": sk.balanced_accuracy_score}
    return plain[name](truth, decided)


def plain_ece(truth, chances) -> float:
    """The definition, bin by bin."""
    confidence, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    total = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


SETS = {
    "plain": lambda: drawn(0),
    "ties": lambda: drawn(1, ties=True),
    "two classes": lambda: drawn(2, classes=2),
    "class absent": lambda: (np.where(drawn(3)[0] == 2, 1, drawn(3)[0]), drawn(3)[1]),
    "one class only": lambda: (np.full(30, 1), drawn(4, rows=30)[1]),
    "one row": lambda: (np.array([2]), drawn(5, rows=1)[1]),
}


@pytest.mark.parametrize("case", SETS)
@pytest.mark.parametrize("name", [name for name in CLASS_METRICS if name not in NUMBERS])
def test_equal_to_scikit_learn(name, case):
    truth, chances = SETS[case]()
    answers = classify(chances, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of the edges that are the point here
        expected = plain_ece(truth, chances) if name == "ece" else reference(name, truth, chances, chances.shape[1])
    assert CLASS_METRICS[name].score(answers) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("case", SETS)
def test_confusion_matrix_and_curves_equal_scikit_learn(case):
    truth, chances = SETS[case]()
    classes = chances.shape[1]
    answers = classify(chances, truth)
    expected = sk.confusion_matrix(truth, chances.argmax(axis=1), labels=range(classes))
    assert np.array_equal(confusion_matrix(answers), expected)
    for label in range(classes):
        if len(set(truth == label)) == 2:
            false, true, _ = sk.roc_curve(truth == label, chances[:, label], drop_intermediate=False)
            ours = roc_curve(answers, label)
            np.testing.assert_allclose(ours, (false, true), atol=1e-12)


def test_several_labels_per_row():
    rng = np.random.default_rng(0)
    truth, chances = rng.integers(0, 2, (80, 3)), rng.uniform(size=(80, 3))
    truth[:, 2] = 0  # a class that never occurs
    answers, decided = classify(chances, truth), (chances > 0.5).astype(int)
    score = {name: metric.score(answers) for name, metric in CLASS_METRICS.items() if name not in NUMBERS}
    assert score["accuracy"] == pytest.approx(sk.accuracy_score(truth, decided), **CLOSE)
    for average in ("macro", "micro"):
        for kind, of in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
            expected = of(truth, decided, average=average, zero_division=0)
            assert score[f"{average}_{kind}"] == pytest.approx(expected, **CLOSE)
    rocs = [sk.roc_auc_score(truth[:, c], chances[:, c]) for c in (0, 1)]
    assert score["roc_auc"] == pytest.approx(np.mean(rocs), **CLOSE)
    areas = [sk.average_precision_score(truth[:, c], chances[:, c]) for c in (0, 1)]
    assert score["pr_auc"] == pytest.approx(np.mean(areas), **CLOSE)
    losses = [sk.log_loss(truth[:, c], chances[:, c], labels=[0, 1]) for c in range(3)]
    assert score["log_loss"] == pytest.approx(np.mean(losses), **CLOSE)
    assert np.array_equal(confusion_matrix(answers), sk.multilabel_confusion_matrix(truth, decided))


@pytest.mark.parametrize("case", ["plain", "constant", "constant and right", "far from zero", "two targets"])
def test_numbers_equal_scikit_learn(case):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 2) if case == "two targets" else 50)
    truth = np.full(50, 3.0) if case.startswith("constant") else truth
    truth = truth + 1e7 if case == "far from zero" else truth
    found = truth if case.endswith("right") else truth + rng.normal(size=truth.shape)
    answers = measure(found, truth)
    assert CLASS_METRICS["mae"].score(answers) == pytest.approx(sk.mean_absolute_error(truth, found), **CLOSE)
    assert CLASS_METRICS["rmse"].score(answers) == pytest.approx(sk.root_mean_squared_error(truth, found), **CLOSE)
    assert CLASS_METRICS["r2"].score(answers) == pytest.approx(sk.r2_score(truth, found), **CLOSE)


def test_ece_by_hand():
    # Two rows at 0.9 of which one is right, one at 0.6 that is right: 2/3 |0.5 - 0.9| + 1/3 |1 - 0.6|.
    chances = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]
    answers = classify(chances, [0, 1, 1])
    assert CLASS_METRICS["ece"].score(answers) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    bins = reliability(answers)
    assert bins["count"].sum() == 3
    assert bins["accuracy"][bins["count"] == 2].tolist() == [0.5]
    assert np.isnan(bins["accuracy"][bins["count"] == 0]).all()
    assert CLASS_METRICS["ece"].score(classify([[1.0, 0.0]], [0])) == 0.0


@pytest.mark.parametrize("name", sorted(CLASS_METRICS))
@pytest.mark.parametrize("case", ["ties", "class absent"])
def test_an_interval_is_that_of_the_resampled_rows(name, case):
    """Every draw scored again from its rows, written out. The draws are those of `intervals.resampled_sums`."""
    truth, chances = SETS[case]()
    truth, chances = truth[:40], chances[:40]
    number = name in NUMBERS

    def join(rows):
        if number:
            return measure(chances[rows, 0], truth[rows])
        return classify(chances[rows], truth[rows], classes=chances.shape[1])

    found = class_interval(name, join(np.arange(40)), resamples=60, seed=3)
    counts = resampled_sums(np.eye(40), resamples=60, seed=3).astype(int)
    scores = np.array([CLASS_METRICS[name].score(join(np.repeat(np.arange(40), row))) for row in counts])
    known = scores[~np.isnan(scores)]
    low, high = np.percentile(known, (2.5, 97.5))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.value == pytest.approx(CLASS_METRICS[name].score(join(np.arange(40))), abs=1e-12)
    assert (found.n, found.undefined) == (40, len(scores) - len(known))


def test_undefined_draws_are_counted_and_never_crash():
    chances = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found = class_interval("roc_auc", classify(chances, [0, 0, 1]), resamples=200, seed=0)
    # A draw of three rows lacks one of the two kinds with (2/3)^3 + (1/3)^3 = 1/3.
    assert found.undefined == pytest.approx(200 / 3, abs=25)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    nothing = class_interval("roc_auc", classify(chances, [0, 0, 0]), resamples=20)
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.undefined == 20
    assert math.isnan(CLASS_METRICS["quadratic_kappa"].score(classify([1, 1], [1, 1])))


def test_a_difference_is_paired():
    truth, chances = drawn(0, rows=60)
    worse = np.roll(chances, 1, axis=1)
    first, second = classify(chances, truth), classify(worse, truth)
    for name in ("accuracy", "macro_f1", "roc_auc"):
        same = class_difference(name, first, first, resamples=50)
        assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
        apart = class_difference(name, first, second, resamples=200)
        assert apart.difference == pytest.approx(CLASS_METRICS[name].score(first) - CLASS_METRICS[name].score(second))
        assert apart.low > 0 and apart.p < 0.05
    assert class_difference("accuracy", first, second, resamples=50).mcnemar_p is not None
    with pytest.raises(ValueError, match="the same references"):
        class_difference("accuracy", first, classify(chances, truth[::-1]))


@pytest.mark.parametrize("name", [*sorted(CLASS_METRICS), "confusion_matrix"])
def test_evaluate_face_needs_no_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    truth, chances = drawn(0, rows=20)
    module = load_metric(name)
    if name in NUMBERS:
        expected = CLASS_METRICS[name].score(measure(chances[:, 0], truth))
        found = module.compute(predictions=chances[:, 0].tolist(), references=truth.tolist())
    else:
        answers = classify(chances, truth)
        expected = confusion_matrix(answers) if name == "confusion_matrix" else CLASS_METRICS[name].score(answers)
        found = module.compute(predictions=chances.tolist(), references=truth.tolist())
    assert found is not None
    np.testing.assert_allclose(found[name], expected)
    if name == "macro_f1":
        decided = module.compute(predictions=chances.argmax(axis=1).tolist(), references=truth.tolist())
        assert decided == pytest.approx(found)


def test_bad_input_is_named():
    with pytest.raises(DataError, match="2 predictions for 1 references"):
        classify([0, 1], [0])
    with pytest.raises(DataError, match="0 predictions for 0 references"):
        classify([], [])
    with pytest.raises(DataError, match="reference 4 is no declared class[\\s\\S]*row 1[\\s\\S]*0 to 2"):
        classify([0, 1], [0, 4], classes=3)
    with pytest.raises(DataError, match="prediction nan"):
        classify([0, math.nan], [0, 1], classes=3)
    with pytest.raises(DataError, match="row 1[\\s\\S]*not the logits"):
        classify([[0.5, 0.5], [2.0, -1.0]], [0, 1])
    with pytest.raises(DataError, match="3 probabilities per row for 2 classes"):
        classify([[0.5, 0.5, 0.0]], [0], classes=2)
    with pytest.raises(DataError, match="roc_auc needs probabilities"):
        CLASS_METRICS["roc_auc"].score(classify([0, 1], [0, 1]))
    with pytest.raises(DataError, match="a reference is not finite"):
        measure([1.0], [math.inf])
    with pytest.raises(RecipeError, match="nearest: 'macro_f1'"):
        class_interval("macrof1", classify([0], [0], classes=2))
    with pytest.raises(RecipeError, match="no metric is called 'accurate'"):
        load_metric("accurate")
