"""Retrieval, zero-shot and the linear probe against brute force in numpy and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmft.errors import DataError
from mmft.evaluation import retrieval
from mmft.evaluation.linear_probe import fit, linear_probe
from mmft.evaluation.retrieval import compare, retrieve
from mmft.evaluation.zero_shot import class_ranks, class_vectors, zero_shot


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute(queries: torch.Tensor, rows: torch.Tensor, own: list[int], other: list[int]) -> tuple[list[int], list[float]]:
    """Best rank and average precision of each query from the whole sorted list; wrong rows first where scores tie."""
    ranks, precisions = [], []
    for i, group in enumerate(own):
        if group < 0:
            continue
        scored = [
            (-round(float(queries[i].double() @ rows[j].double()), 6), other[j] == group) for j in range(len(rows))
        ]
        ordered = [right for _, right in sorted(scored)]  # False sorts before True
        places = [place for place, right in enumerate(ordered, start=1) if right]
        ranks.append(places[0])
        precisions.append(sum(number / place for number, place in enumerate(places, start=1)) / len(places))
    return ranks, precisions


@pytest.mark.parametrize("block", [1, 50, 4_000_000])
def test_ranks_equal_a_sorted_list(block, monkeypatch):
    """Several captions a picture, distractors on both sides, blocks of one row and of all."""
    monkeypatch.setattr(retrieval, "BLOCK", block)
    left_groups = [3, 1, 2, -1, 7, 8, 9, -1]
    right_groups = [2, 2, 3, 1, -1, 7, 7, 7, 8, 9, -1]
    left, right = unit(8, 4, 0), unit(11, 4, 1)
    found = retrieve(left, right, left_groups=left_groups, right_groups=right_groups, resamples=50)
    for key, wanted, candidates in (
        ("image_to_text", brute(left, right, left_groups, right_groups), 11),
        ("text_to_image", brute(right, left, right_groups, left_groups), 8),
    ):
        one = found[key]
        assert one.candidates == candidates
        assert one.ranks.tolist() == wanted[0]
        np.testing.assert_allclose(one.precision, wanted[1], rtol=0, atol=1e-12)
        for k in (1, 5, 10):
            assert one.scores[f"r@{k}"].value == pytest.approx(np.mean(np.asarray(wanted[0]) <= k), abs=1e-12)
        assert one.scores["median_rank"].value == np.median(wanted[0])
        assert one.scores["map"].value == pytest.approx(np.mean(wanted[1]), abs=1e-12)
        assert one.scores["r@1"].n == len(wanted[0])


def test_columns_in_blocks_equal_the_whole(monkeypatch):
    left, right = unit(40, 6, 2), unit(9000, 6, 3)
    groups = [*range(40), *[-1] * 8960]
    found = retrieve(left, right, left_groups=range(40), right_groups=groups, resamples=5)
    scores = left.double() @ right.double().T
    wanted = 1 + (scores > scores.diagonal()[:, None]).sum(1)
    assert found["image_to_text"].ranks.tolist() == wanted.tolist()


def test_ties_count_against_the_model():
    """A model that says the same of everything: every answer comes last."""
    same = torch.ones(6, 3) / 3**0.5
    found = retrieve(same, same, resamples=10)["image_to_text"]
    assert found.ranks.tolist() == [6] * 6
    assert found.scores["r@1"].value == 0.0
    assert found.scores["map"].value == pytest.approx(1 / 6)


def test_two_answers_that_tie_share_the_last_place():
    left = F.normalize(torch.tensor([[1.0, 0.0]]), dim=-1)
    right = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]), dim=-1)
    found = retrieve(left, right, left_groups=[0], right_groups=[0, 0, -1], resamples=5)["image_to_text"]
    assert found.ranks.tolist() == [1] and found.precision.tolist() == [1.0]


def test_captions_of_one_picture_are_drawn_together():
    """Ten pictures with five captions that all succeed or all fail: as wide as ten rows, not as fifty."""
    left = torch.eye(10)
    right = torch.cat([torch.eye(10)[i if i < 5 else (i + 1) % 10].repeat(5, 1) for i in range(10)])
    groups = [i for i in range(10) for _ in range(5)]
    found = retrieve(left, right, left_groups=range(10), right_groups=groups, resamples=4000)["text_to_image"]
    one = found.scores["r@1"]
    assert one.value == 0.5 and one.n == 50
    # Half of the binomial's 2.5 and 97.5 percent points of ten draws: 0.2 and 0.8.
    assert (one.low, one.high) == (0.2, 0.8)


def test_the_median_comes_from_the_same_draws():
    ranks = np.asarray([1, 2, 3, 10, 50])
    found = retrieval._median(ranks, np.arange(5), resamples=300, seed=7)
    rng = np.random.default_rng(7)
    wanted = [np.median(ranks[rng.integers(0, 5, size=5)]) for _ in range(300)]
    assert (found.low, found.high) == tuple(np.percentile(wanted, (2.5, 97.5)))


def test_paired_differences():
    base, better = unit(30, 5, 4), unit(30, 5, 5)
    one = retrieve(base, base, resamples=100)["image_to_text"]
    other = retrieve(base, better, resamples=100)["image_to_text"]
    found = compare(one, other, resamples=200)
    assert found["r@1"].difference == pytest.approx(1.0 - other.scores["r@1"].value)
    assert found["r@1"].low > 0 and found["r@1"].n == 30
    assert compare(one, one)["map"].difference == 0.0
    with pytest.raises(ValueError, match="same queries"):
        compare(one, retrieve(base[:5], base[:5], resamples=5)["image_to_text"])


def test_what_cannot_be_ranked_is_refused():
    left, right = unit(2, 3, 0), unit(2, 3, 1)
    with pytest.raises(DataError, match=r"1 queries have no answer \(the first: group 5\)"):
        retrieve(left, right, left_groups=[0, 5], right_groups=[0, -1])
    with pytest.raises(DataError, match="there is no query"):
        retrieve(left, right, left_groups=[-1, -1], right_groups=[-1, -1])
    with pytest.raises(DataError, match="3 groups for 2 rows of image"):
        retrieve(left, right, left_groups=[0, 1, 2])
    with pytest.raises(DataError, match="embeddings of text are not finite"):
        retrieve(left, right * float("nan"))


# ---------------------------------------------------------------- zero-shot


def test_a_class_is_the_mean_of_its_prompts():
    table = {}

    def embed(texts: list[str]) -> torch.Tensor:
        for text in texts:
            table.setdefault(text, unit(1, 6, 100 + len(table))[0] * 3.0)
        return torch.stack([table[text] for text in texts])

    vectors = class_vectors(embed, ["fox", ["lorry", "truck"]], templates=("a {}.", "the {}"))
    for number, names in enumerate((["fox"], ["lorry", "truck"])):
        prompts = [t.format(name) for name in names for t in ("a {}.", "the {}")]
        mean = np.mean([table[p].double().numpy() / np.linalg.norm(table[p].double()) for p in prompts], axis=0)
        np.testing.assert_allclose(vectors[number].numpy(), mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(DataError, match="template 'a fox' has no place for the class"):
        class_vectors(embed, ["fox"], templates=("a fox",))
    with pytest.raises(DataError, match="a class has no name"):
        class_vectors(embed, ["fox", ""])


def test_top_one_and_five_equal_argsort():
    pictures, vectors = unit(60, 5, 6), unit(12, 5, 7)
    labels = np.random.default_rng(0).integers(0, 12, 60)
    found = zero_shot(pictures, vectors, labels.tolist(), resamples=200)
    order = np.argsort(-(pictures.double() @ vectors.double().T).numpy(), axis=1)
    for k in (1, 5):
        wanted = np.mean([labels[i] in order[i, :k] for i in range(60)])
        got = found[f"top{k}"]
        assert got.value == pytest.approx(wanted) and got.low <= wanted <= got.high and got.n == 60
    tied = torch.ones(1, 5) / 5**0.5
    assert class_ranks(tied, tied.repeat(4, 1), torch.tensor([2])).tolist() == [4]
    with pytest.raises(DataError, match="label 12 is no class"):
        zero_shot(pictures[:1], vectors, [12])


# ---------------------------------------------------------------- the linear probe


@pytest.mark.parametrize("classes", [2, 4])
def test_both_solvers_find_the_same_classifier(classes):
    """A convex problem with one solution; 2e-3 is where scikit-learn's tolerance on the gradient stops."""
    rng = np.random.default_rng(1)
    targets = np.concatenate([np.arange(classes), rng.integers(0, classes, 90)])
    x = rng.normal(size=(len(targets), 5)) + np.eye(classes, 5)[targets]
    ours = fit(x, targets, 0.1, solver="torch", classes=classes)
    theirs = fit(x, targets, 0.1, solver="scikit-learn", classes=classes)
    for values in (*zip(ours, theirs, strict=True),):
        one, other = (value - value.mean(0) for value in values)  # a shift of all classes changes nothing
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_the_probe_learns_what_is_linear():
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(3, 8)) * 3
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, 150)])
    x = torch.from_numpy(centres[labels] + rng.normal(size=(153, 8)))
    names = np.asarray([10, 20, 30])[labels]
    for solver in ("scikit-learn", "torch"):
        found = linear_probe(x[:100], names[:100], x[100:], names[100:], solver=solver, resamples=100)
        assert found.solver == solver and found.accuracy.value > 0.9
        assert found.accuracy.value == np.mean(found.predictions == names[100:])
        assert found.strength in (0.001, 0.01, 0.1, 1.0)
    with pytest.raises(DataError, match="the training rows have 1 class"):
        linear_probe(x[:5], [1] * 5, x[:5], [1] * 5)
    with pytest.raises(DataError, match="test features are not finite"):
        linear_probe(x[:20], names[:20], x[:2] * float("inf"), [10, 10])
