"""Each metric against its reference implementation, or against numbers worked out by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.meteor.meteor import Meteor as CocoMeteor
from pycocoevalcap.rouge.rouge import Rouge as CocoRouge

from mmft.errors import DataError, RecipeError
from mmft.evaluation.metrics import METRICS, load_metric
from mmft.evaluation.metrics.base import tokenize
from mmft.evaluation.metrics.exact_match import normalize as exact
from mmft.evaluation.metrics.meteor import Meteor, why_not
from mmft.evaluation.metrics.rouge_l import common_subsequence
from mmft.evaluation.metrics.vqa_accuracy import accuracy
from mmft.evaluation.metrics.vqa_accuracy import normalize as vqa

WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "red",
    "small",
    "runs",
    "with",
    "don't",
    "t-shirt",
    "3.5",
    "über",
]


def corpus(seed: int, rows: int = 60) -> tuple[list[str], list[list[str]]]:
    """Random captions, already tokenized; some answers empty, some equal to a reference."""
    draw = random.Random(seed)

    def caption(low: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, 14)))

    references = [[caption(1) for _ in range(draw.randint(1, 5))] for _ in range(rows)]
    predictions = [draw.choice(row) if draw.random() < 0.3 else caption(0) for row in references]
    return predictions, references


def as_coco(predictions: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    return dict(enumerate(references)), {index: [text] for index, text in enumerate(predictions)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_caption_metrics_equal_the_coco_tools(seed):
    predictions, references = corpus(seed)
    assert all(tokenize(text) == text for text in predictions)
    truth, answers = as_coco(predictions, references)

    bleus, bleu_rows = CocoBleu(4).compute_score(truth, answers, verbose=0)
    ours = METRICS["bleu"].score(predictions, references)
    assert [ours[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleus, abs=1e-9)
    assert ours["bleu"] == ours["bleu_4"]
    stats = METRICS["bleu"].rows(predictions, references)
    assert METRICS["bleu"].each(stats) == pytest.approx(np.asarray(bleu_rows[3]), abs=1e-9)

    for name, scorer in (("cider", CocoCider()), ("rouge_l", CocoRouge())):
        value, rows = scorer.compute_score(truth, answers)
        stats = METRICS[name].rows(predictions, references)
        assert METRICS[name].aggregate(stats) == pytest.approx(value, abs=1e-9)
        assert stats[:, 0] == pytest.approx(rows, abs=1e-9)


needs_java = pytest.mark.skipif(why_not() is not None, reason=f"METEOR cannot run: {why_not()}")
NAMES = [pytest.param(name, marks=needs_java) if name == "meteor" else name for name in sorted(METRICS)]


@needs_java
@pytest.mark.parametrize("seed", [0, 1])
def test_meteor_equals_the_coco_tools(seed):
    """The set's score too: it is a formula over summed counts, so that a bootstrap needs no Java."""
    predictions, references = corpus(seed)
    words = ("cats sitting", "a small dog", "two dogs run with the cat", "")
    predictions[: len(words)] = words
    value, rows = CocoMeteor().compute_score(*as_coco(predictions, references))
    metric = METRICS["meteor"]
    stats = metric.rows(predictions, references)
    assert metric.aggregate(stats) == pytest.approx(value, abs=1e-9)
    assert metric.each(stats) == pytest.approx(np.asarray(rows), abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lower_orders_of_bleu_have_scores_of_their_own(order):
    predictions, references = corpus(4)
    bleus, rows = CocoBleu(4).compute_score(*as_coco(predictions, references), verbose=0)
    metric = METRICS[f"bleu_{order}"]
    stats = metric.rows(predictions, references)
    assert metric.aggregate(stats) == pytest.approx(bleus[order - 1], abs=1e-9)
    assert metric.each(stats) == pytest.approx(np.asarray(rows[order - 1]), abs=1e-9)


def test_meteor_without_java_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert why_not() == "there is no `java` on the PATH"
    with pytest.raises(DataError, match="no `java`.*|meteor cannot run"):
        Meteor().rows(["a"], [["a"]])


def test_subsequence_equals_the_plain_table():
    draw = random.Random(0)
    for _ in range(300):
        one, other = (draw.choices("abcd", k=draw.randint(0, 12)) for _ in range(2))
        table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
        for (i, left), (j, right) in itertools.product(enumerate(one, 1), enumerate(other, 1)):
            table[i, j] = table[i - 1, j - 1] + 1 if left == right else max(table[i - 1, j], table[i, j - 1])
        assert common_subsequence(one, other) == table[-1, -1]


def test_tokens_of_captions():
    assert tokenize("A man, in a T-shirt -- doesn’t WAIT.") == "a man in a t-shirt doesn't wait"
    assert tokenize("3.5 km at 9 a.m.") == "3.5 km at 9 a.m"
    assert tokenize("हिन्दी में") == "हिन्दी में"  # vowel signs are marks, not word ends
    assert tokenize("猫が走る🐱ok") == "猫 が 走 る 🐱 ok"
    assert tokenize("cafe\u0301") == tokenize("caf\u00e9")
    assert tokenize(" \n.,!") == ""


def test_vqa_accuracy_leaves_each_person_out():
    def slow(answer: str, people: list[str]) -> float:
        scores = []
        for left_out in range(len(people)):
            others = [vqa(text) for index, text in enumerate(people) if index != left_out]
            scores.append(min(1.0, others.count(vqa(answer)) / 3))
        return sum(scores) / len(scores)

    for matches in range(11):
        people = ["Two"] * matches + [f"other {index}" for index in range(10 - matches)]
        assert accuracy("2", people) == pytest.approx(slow("2", people), abs=1e-12)
    # By hand: 1 match: 9 of 10 leave it in, 9 * 1/3 / 10; 3 matches: (3 * 2/3 + 7 * 1) / 10.
    assert accuracy("x", ["x"] + ["y"] * 9) == pytest.approx(0.3)
    assert accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx(0.9)
    assert accuracy("x", ["x"] * 4 + ["y"] * 6) == pytest.approx(1.0)
    assert (accuracy("yes", ["Yes."]), accuracy("no", ["yes"])) == (1.0, 0.0)
    assert accuracy("a cat", ["cat", "dog"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000 people", "1000 people"),
        ("3.5", "3.5"),
        ("Yes.", "yes"),
        ("red/green", "red green"),
        ("red , green", "red green"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("it’s", "it's"),
        ("its well shed", "its well shed"),
        ("what?\n", "what"),
        ("", ""),
    ],
)
def test_vqa_normalization(text, expected):
    assert vqa(text) == expected


def test_token_f1_by_hand():
    f1 = METRICS["token_f1"]

    def one(prediction: str, *references: str) -> float:
        return f1.aggregate(f1.rows([prediction], [list(references)]))

    assert one("the cat sat", "cat sat down") == pytest.approx(0.8)  # P = 2/2, R = 2/3
    assert one("cat cat", "cat") == pytest.approx(2 / 3)  # a word counts as often as it is there
    assert one("Left of the dog!", "left of dog") == 1.0
    assert one("red", "blue", "red car") == pytest.approx(2 / 3)
    assert (one("", "the"), one("", "cat"), one("the", "cat")) == (1.0, 0.0, 0.0)


def test_exact_match_normalization():
    assert exact("  Red  CAR. ") == "red car"
    assert exact("Straße") == exact("STRASSE")
    assert exact("cafe\u0301") == exact("café")
    assert exact("wait...") == "wait..."
    metric = METRICS["exact_match"]
    assert metric.rows(["Red.", "blue"], [["green", "red"], ["red"]]).ravel().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_odd_texts_give_finite_scores(name):
    metric = METRICS[name]
    texts = ["", " ", ".", "🐱", "猫", "\u200b", "a" * 5000, "\ud7ff", "x\ny"]
    stats = metric.rows(texts, [["cat", ""]] * len(texts))
    assert np.isfinite(stats).all()
    assert np.isfinite(metric.each(stats)).all()
    assert np.isfinite(metric.aggregate(stats))
    assert np.isfinite(metric.aggregate(metric.rows([""] * 3, [["the cat sat"]] * 3)))


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_answer_is_best_and_order_does_not_matter(name):
    metric = METRICS[name]
    _, references = corpus(5, rows=20)
    perfect = metric.rows([row[0] for row in references], references)
    assert metric.aggregate(perfect) > metric.aggregate(metric.rows(["zzz"] * 20, references))
    assert metric.aggregate(perfect[::-1]) == pytest.approx(metric.aggregate(perfect))


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_face_needs_no_hub(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    predictions, references = corpus(3, rows=12)
    module = load_metric(name)
    expected = METRICS[name].score(predictions, references)
    assert module.compute(predictions=predictions, references=references) == pytest.approx(expected)
    single = module.compute(predictions=["red car"], references=["red car"])
    assert single is not None
    assert single[name] == pytest.approx(METRICS[name].score(["red car"], [["red car"]])[name])


def test_errors_name_the_row_and_the_nearest_metric():
    with pytest.raises(DataError, match="2 predictions but 1 rows"):
        METRICS["exact_match"].rows(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="row 1"):
        METRICS["cider"].rows(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="no rows to score"):
        METRICS["bleu"].aggregate(METRICS["bleu"].rows([], []))
    with pytest.raises(RecipeError, match="nearest: 'exact_match'"):
        load_metric("exactmatch")
