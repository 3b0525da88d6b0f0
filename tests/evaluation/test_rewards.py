"""Rewards: values by hand, bounded patterns, and a function that fails is named with the sample it failed on."""

from __future__ import annotations

import math

import pytest

from mmft.data.sample import Piece, Sample, Turn
from mmft.errors import DataError, NonFiniteError, RecipeError
from mmft.evaluation.rewards import (
    WeightedRewards,
    boxes,
    by_format,
    by_metric,
    find_reward,
    iou,
    one_by_one,
    overlap,
)
from mmft.objectives.online.rollout import Attempt


def attempt(text: str, *references: str, tokens: int = 3, ended: bool = True, name: str = "a") -> Attempt:
    turns = (Turn("user", (Piece("text", "?"),)),)
    return Attempt(Sample(name, turns, answers=references, where=f"rows.jsonl:{name}"), text, tokens, ended)


def test_metrics_are_rewards():
    assert by_metric("exact_match")(attempt("A cat.", "dog", "a cat")) == 1.0
    assert by_metric("exact_match")(attempt("cats", "cat")) == 0.0
    assert by_metric("token_f1")(attempt("red cat", "cat")) == pytest.approx(2 / 3)


def test_format_is_the_whole_answer():
    reward = by_format(r"\d+ (cats|dogs)")
    assert reward(attempt("12 cats")) == 1.0 and reward(attempt("12 cats!")) == 0.0


def test_a_pattern_that_never_ends_is_stopped():
    with pytest.raises(RecipeError, match="needs more than"):
        by_format(r"(a|aa)+$")(attempt("a" * 3_000 + "b"))
    with pytest.raises(RecipeError, match="no regular expression"):
        by_format("(")


def test_boxes_of_a_text():
    assert boxes("the cat is at [1, 2, 3.5, 4] and (8,9,6,7)") == [(1.0, 2.0, 3.5, 4.0), (6.0, 7.0, 8.0, 9.0)]
    assert boxes("[1, 2, 3]") == [] and len(boxes("[0,0,1,1]" * 100)) == 64


def test_overlap():
    assert overlap((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0 and overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_iou_pairs_boxes_and_charges_for_each_that_is_wrong():
    two = "[0,0,2,2] [10,10,12,12]"
    assert iou(attempt("[10,10,12,12] [0,0,2,2]", two)) == pytest.approx(1.0)
    assert iou(attempt("[0,0,2,2]", two)) == pytest.approx(0.5)
    assert iou(attempt(two + "[5,5,6,6]", two)) == pytest.approx(2 / 3)
    assert iou(attempt("[1,1,3,3]", "[9,9,9,9]", "[0,0,2,2]")) == pytest.approx(1 / 7)
    assert iou(attempt("none", "nothing there")) == 1.0 and iou(attempt("none", "[0,0,1,1]")) == 0.0


def test_length_and_end():
    (length,) = find_reward("length", longest=12)([attempt("x", tokens=3)])
    assert length == pytest.approx(-0.25)
    assert list(find_reward("unfinished", longest=1)([attempt("x"), attempt("x", ended=False)])) == [0.0, -1.0]


def test_the_sum_is_weighted_and_its_parts_are_kept():
    terms = {
        "exact_match": (1.0, find_reward("exact_match", longest=10)),
        "format:[a-z ]+": (0.5, find_reward("format:[a-z ]+", longest=10)),
        "length": (2.0, find_reward("length", longest=10)),
    }
    found = WeightedRewards(terms, true=by_metric("exact_match"))(
        [attempt("cat", "cat", tokens=1), attempt("dog", "cat", tokens=5), attempt("DOG", "dog", tokens=10)]
    )
    assert found.total.tolist() == pytest.approx([1 + 0.5 - 0.2, 0.5 - 1.0, 1 - 2.0])
    assert found.true.tolist() == [1.0, 0.0, 1.0] and found.parts["length"].tolist() == pytest.approx(
        [-0.1, -0.5, -1.0]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_no_finite_number_stops_with_the_sample(bad):
    judge = WeightedRewards(
        {"mine": (1.0, one_by_one(lambda one: bad if one.sample.id == "b" else 0.0))}, true=by_metric("exact_match")
    )
    with pytest.raises(NonFiniteError, match=r"reward 'mine' is (nan|inf)[\s\S]*sample b \(rows.jsonl:b\)"):
        judge([attempt("x", "x"), attempt("x", "x", name="b")])


def test_a_reward_that_raises_stops_with_the_sample():
    def mine(one: Attempt) -> float:
        return 1.0 / (one.sample.id != "b")

    judge = WeightedRewards({"mine": (1.0, one_by_one(mine))}, true=by_metric("exact_match"))
    with pytest.raises(DataError, match=r"reward 'mine' raised ZeroDivisionError[\s\S]*sample b"):
        judge([attempt("x", "x"), attempt("x", "x", name="b"), attempt("x", "x", name="c")])


@pytest.mark.parametrize("value", [None, "much"])
def test_a_reward_that_gives_no_number_stops_with_the_sample(value):
    judge = WeightedRewards({"mine": (1.0, one_by_one(lambda one: value))}, true=by_metric("exact_match"))
    with pytest.raises(DataError, match=r"gave (None|'much')[\s\S]*sample a"):
        judge([attempt("x", "x")])
