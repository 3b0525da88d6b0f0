"""The worth of modalities where it is known in closed form, and on a real fusion model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mmft.errors import DataError
from mmft.evaluation.modalities import (
    keep_modalities,
    modality_worths,
    shapley_values,
    shuffle_modality,
)
from tests.fusion.small import FOUR, small_inputs, small_model

NAMES = ("text", "image", "audio", "table")
VALUE = {"text": 0.4, "image": 0.2, "audio": 0.1, "table": 0.0}


def test_additive_scores_give_each_its_own():
    found = shapley_values(NAMES, lambda subset: 0.25 + sum(VALUE[name] for name in subset))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(VALUE, abs=1e-15)


def test_a_glove_game_by_hand():
    """One left glove (text), two right ones: a pair is worth 1. The textbook's values are 2/3, 1/6 and 1/6."""
    found = shapley_values(
        ("text", "image", "audio"), lambda subset: float("text" in subset and bool(subset & {"image", "audio"}))
    )
    assert [float(found[name]) for name in ("text", "image", "audio")] == pytest.approx([2 / 3, 1 / 6, 1 / 6])


def test_equal_to_the_mean_over_all_orders():
    draw = np.random.default_rng(0)
    table = {
        frozenset(chosen): draw.normal(size=7) for size in range(5) for chosen in itertools.combinations(NAMES, size)
    }
    asked: list[frozenset[str]] = []

    def score(subset):
        asked.append(subset)
        return table[subset]

    found = shapley_values(NAMES, score)
    assert len(asked) == len(set(asked)) == 16
    expected = {name: np.zeros(7) for name in NAMES}
    for order in itertools.permutations(NAMES):
        for at, name in enumerate(order):
            gain = table[frozenset(order[: at + 1])] - table[frozenset(order[:at])]
            expected[name] += gain / math.factorial(4)
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-14)
    np.testing.assert_allclose(sum(found.values()), table[frozenset(NAMES)] - table[frozenset()], atol=1e-14)


def test_the_figures_of_a_known_game():
    """Right when text is there or image and audio both are; row by row, so with intervals."""
    rows = np.arange(200) % 4 != 0  # a quarter of the rows is never right

    def score(subset):
        return rows * float("text" in subset or {"image", "audio"} <= subset)

    calls: list[str] = []

    def shuffled(name):
        calls.append(name)
        return rows * 0.5

    found = modality_worths(("text", "image", "audio"), score, shuffled=shuffled, resamples=300, seed=1)
    assert (found.full.value, found.empty.value, found.full.n) == (0.75, 0.0, 200)
    assert calls == ["text", "image", "audio"]
    text, image, _ = found.modalities
    assert (text.without.value, text.alone.value, text.loss_without.value) == (0.75, 0.75, 0.0)
    assert (image.alone.value, image.loss_without.value, image.loss_shuffled.value) == (0.0, 0.0, 0.375)
    assert text.shapley.value == pytest.approx(0.75 * 2 / 3)
    assert image.shapley.value == pytest.approx(0.75 / 6)
    # Normal approximation of a share of 3/4 over 200 rows: 1.96 sqrt(0.1875 / 200) = 0.06.
    assert found.full.low == pytest.approx(0.69, abs=0.015)
    assert found.full.high == pytest.approx(0.81, abs=0.015)
    assert text.shapley.low == pytest.approx(2 / 3 * found.full.low)
    plain = modality_worths(("text",), lambda subset: float(len(subset)))
    assert (plain.full.value, plain.full.n, plain.modalities[0].shuffled) == (1.0, 0, None)
    assert math.isnan(plain.full.low)


def test_keeping_and_shuffling_on_a_fusion_model():
    names = (*FOUR, "table")
    model, inputs = small_model(), small_inputs(rows=5)
    present = {name: torch.tensor([True, True, True, name != "bert", True]) for name in names}
    batch = {"modalities": inputs, "present": present}
    kept = keep_modalities(batch, {"bert", "table"})
    only = {name: inputs[name] for name in ("bert", "table")}
    expected = model(modalities=only, present={"bert": present["bert"]}).logits
    torch.testing.assert_close(model(**kept).logits, expected, rtol=0, atol=1e-12)

    mixed = shuffle_modality(batch, "bert", seed=0)
    assert all(mixed["modalities"][name] is inputs[name] for name in ("resnet", "hubert", "table"))
    ids, before = mixed["modalities"]["bert"]["input_ids"], inputs["bert"]["input_ids"]
    origin = [next(at for at in range(5) if torch.equal(before[at], row)) for row in ids]
    assert sorted(origin) == list(range(5))
    assert all(at != place for place, at in enumerate(origin))
    assert mixed["present"]["bert"].tolist() == [bool(present["bert"][at]) for at in origin]
    again = shuffle_modality(batch, "bert", seed=0)
    assert torch.equal(again["modalities"]["bert"]["input_ids"], ids)

    labels = torch.tensor([0, 1, 2, 0, 1])

    def score(subset):
        return (model(**keep_modalities(batch, subset)).logits.argmax(dim=-1) == labels).double().numpy()

    found = modality_worths(names, score, resamples=20)
    total = sum(one.shapley.value for one in found.modalities)
    assert total == pytest.approx(found.full.value - found.empty.value)


def test_bad_games_are_named():
    with pytest.raises(DataError, match="not finite[\\s\\S]*text\\+image"):
        shapley_values(("text", "image"), lambda subset: math.nan if len(subset) == 2 else 0.0)
    with pytest.raises(DataError, match=r"\(3,\) scores where others have \(2,\)[\s\S]*image"):
        shapley_values(("text", "image"), lambda subset: np.zeros(3 if "image" in subset else 2))
    with pytest.raises(DataError, match="1 to 12 different ones"):
        shapley_values([str(at) for at in range(13)], lambda subset: 0.0)
    with pytest.raises(DataError, match="text, text"):
        shapley_values(("text", "text"), lambda subset: 0.0)
    one = {"modalities": {}, "present": {"text": torch.tensor([True])}}
    with pytest.raises(DataError, match="one row cannot be shuffled"):
        shuffle_modality(one, "text", seed=0)
