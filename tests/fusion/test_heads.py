"""Losses, probabilities and decisions against their formulas, written out row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmft.errors import DataError, RecipeError
from mmft.fusion.heads import Head, balanced_weights, count_of, decide, loss_of, probabilities
from tests.fusion.small import small_config

torch.manual_seed(0)
OUT3 = torch.randn(6, 3, dtype=torch.float64) * 2
LABELS = torch.tensor([0, 1, 2, 2, -100, 1])
WEIGHTS = [0.5, 1.0, 2.5]
CLOSE = {"rel": 1e-12}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_single_label(gamma, smoothing, weights):
    config = small_config(focal_gamma=gamma, label_smoothing=smoothing, class_weights=weights)
    expected = 0.0
    for row, label in zip(OUT3.tolist(), LABELS.tolist(), strict=True):
        if label == -100:
            continue
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        q = [(1 - smoothing) * (c == label) + smoothing / 3 for c in range(3)]
        cross = -sum(a * math.log(b) for a, b in zip(q, p, strict=True))
        expected += (weights or [1, 1, 1])[label] * (1 - p[label]) ** gamma * cross
    total, count = loss_of(config, OUT3, LABELS)
    assert total.item() == pytest.approx(expected, **CLOSE)
    assert count == count_of(config, LABELS) == 5


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_multi_label_leaves_unknown_entries_out(gamma, weights):
    config = small_config(task="multi_label", focal_gamma=gamma, label_smoothing=0.1, class_weights=weights)
    labels = torch.tensor([[0.0, 1, 1], [1, math.nan, 0], [0, 0, 0], [1, 1, 1], [math.nan] * 3, [0, 1, 0]])
    expected, known = 0.0, 0
    for outs, row in zip(OUT3.tolist(), labels.tolist(), strict=True):
        for at, (out, y) in enumerate(zip(outs, row, strict=True)):
            if math.isnan(y):
                continue
            known += 1
            smooth, p = y * 0.9 + 0.05, sigmoid(out)
            cross = -(smooth * math.log(p) + (1 - smooth) * math.log(1 - p))
            expected += (weights or [1, 1, 1])[at] * (1 - (p if y else 1 - p)) ** gamma * cross
    total, count = loss_of(config, OUT3, labels)
    assert total.item() == pytest.approx(expected, **CLOSE)
    assert count == count_of(config, labels) == known == 14
    assert torch.equal(decide(config, OUT3), OUT3 > 0)


def test_corn_is_a_chain_of_conditionals():
    config = small_config(task="ordinal", labels=4)
    labels = torch.tensor([0, 1, 2, 3, -100, 3])
    expected, asked = 0.0, 0
    for outs, y in zip(OUT3.tolist(), labels.tolist(), strict=True):
        for k in range(3):
            if y >= k:  # only rows that reached k - 1 are asked whether they go beyond k
                asked += 1
                expected -= math.log(sigmoid(outs[k]) if y > k else 1 - sigmoid(outs[k]))
    total, count = loss_of(config, OUT3, labels)
    assert total.item() == pytest.approx(expected, **CLOSE)
    assert count == count_of(config, labels) == asked
    chances = probabilities(config, OUT3)
    for outs, row in zip(OUT3.tolist(), chances.tolist(), strict=True):
        s = [sigmoid(x) for x in outs]
        assert row == pytest.approx([1 - s[0], s[0] * (1 - s[1]), s[0] * s[1] * (1 - s[2]), s[0] * s[1] * s[2]])
    # -log of the class's probability is the row's loss: the chain is a likelihood.
    kept = labels != -100
    picked = chances[kept].gather(1, labels[kept][:, None]).log().sum()
    assert total.item() == pytest.approx(-picked.item(), **CLOSE)


def test_cumulative_logits_are_ordered_and_a_likelihood():
    config = small_config(task="ordinal", labels=4, ordinal_rule="cumulative", class_weights=[1.0, 2.0, 3.0, 4.0])
    head = Head(config).double()
    torch.nn.init.normal_(head.steps, std=3.0)
    out = head(torch.randn(6, 16, dtype=torch.float64)).detach()
    assert (out[:, :-1] > out[:, 1:]).all()
    labels = torch.tensor([0, 1, 2, 3, -100, 2])
    expected = 0.0
    for outs, y in zip(out.tolist(), labels.tolist(), strict=True):
        if y != -100:
            above = [1.0, *map(sigmoid, outs), 0.0]
            expected -= (y + 1) * math.log(above[y] - above[y + 1])
    total, count = loss_of(config, out, labels)
    assert total.item() == pytest.approx(expected, rel=1e-9)  # the plain difference of sigmoids loses digits
    assert count == count_of(config, labels) == 5
    torch.testing.assert_close(probabilities(config, out).sum(1), torch.ones(6, dtype=torch.float64))


def test_cumulative_tails_stay_finite():
    config = small_config(task="ordinal", labels=4, ordinal_rule="cumulative")
    far = torch.tensor([[90.0, 89.0, 88.0], [-88.0, -89.0, -90.0]]).requires_grad_()
    total, _ = loss_of(config, far, torch.tensor([1, 2]))
    total.backward()
    # log(sigmoid(90) - sigmoid(89)) = -89 + log(1 - 1/e) to the last digit; the other row is its mirror image.
    assert total.item() == pytest.approx(2 * (89 - math.log(1 - math.exp(-1))), rel=1e-6)
    assert torch.isfinite(far.grad).all()


def test_regression_is_learned_standardised():
    config = small_config(task="regression", labels=2, target_mean=[10.0, -1.0], target_std=[2.0, 0.5])
    out, labels = OUT3[:3, :2], torch.tensor([[12.0, math.nan], [9.0, 0.0], [10.0, -1.0]], dtype=torch.float64)
    scaled = [[1.0, None], [-0.5, 2.0], [0.0, 0.0]]
    expected = sum(
        (o - t) ** 2
        for outs, row in zip(out.tolist(), scaled, strict=True)
        for o, t in zip(outs, row, strict=True)
        if t is not None
    )
    total, count = loss_of(config, out, labels)
    assert (total.item(), count) == (pytest.approx(expected, **CLOSE), 5)
    assert decide(config, out)[0].tolist() == pytest.approx([10 + 2 * out[0, 0].item(), -1 + 0.5 * out[0, 1].item()])


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_loss_has_a_gradient_at_certainty(gamma):
    config = small_config(focal_gamma=gamma)
    out = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]]).requires_grad_()
    loss_of(config, out, torch.tensor([0, 0]))[0].backward()
    assert torch.isfinite(out.grad).all()


def test_balanced_weights_equal_scikit_learn():
    sklearn = pytest.importorskip("sklearn.utils.class_weight", reason="extra: test")
    labels = [0] * 5 + [1] * 2 + [2] * 13
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights([5, 2, 13]) == pytest.approx(expected.tolist(), rel=1e-15)
    with pytest.raises(DataError, match=r"class\(es\) 1 never occur in training"):
        balanced_weights([5, 0, 13])


def test_labels_outside_of_the_declared_set_are_named():
    with pytest.raises(DataError, match=r"label 3 is not in the declared set[\s\S]*row 1[\s\S]*0 to 2"):
        loss_of(small_config(), OUT3[:2], torch.tensor([0, 3]))
    with pytest.raises(DataError, match="label 2.0 is not in the declared set"):
        loss_of(small_config(task="multi_label"), OUT3[:1], torch.tensor([[0.0, 1.0, 2.0]]))
    with pytest.raises(DataError, match="label inf"):
        loss_of(small_config(task="regression", labels=1), OUT3[:1, :1], torch.tensor([[math.inf]]))
    with pytest.raises(DataError, match=r"labels of shape \(2,\)"):
        loss_of(small_config(task="multi_label"), OUT3[:2], torch.tensor([0, 1]))


def test_no_known_label_is_a_loss_of_zero():
    total, count = loss_of(small_config(), OUT3, torch.full((6,), -100))
    assert (total.item(), count) == (0.0, 0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"strategy": "gate"}, "nearest: 'gated'"),
        ({"pooling": "max"}, "'max' is no pooling"),
        ({"class_weights": [1.0]}, "one finite weight"),
        ({"task": "regression", "focal_gamma": 2.0}, "no meaning for a regression head"),
        ({"task": "ordinal", "labels": 1}, r"ordinal head with 1 label\(s\)"),
        ({"hidden_size": 18}, "no multiple of 2 x 2 heads"),
        ({"modality_dropout": 1.0}, "modality_dropout is 1.0"),
        (
            {"task": "ordinal", "strategy": "late", "late_rule": "stacking", "ordinal_rule": "cumulative"},
            "does not keep cumulative logits in order",
        ),
    ],
)
def test_bad_settings_are_refused(fields, text):
    with pytest.raises(RecipeError, match=text):
        small_config(**fields).check()
