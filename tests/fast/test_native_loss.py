"""The head's loss by the kernel against float64, and in the place of torch's where it fits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.fast import linear_loss, native_build, native_loss
from mmft.fast.linear_loss import LinearHead, linear_cross_entropy
from mmft.fast.native_loss import fits, head_loss
from tests.fast.native import Guarded, kernels, needs_kernels

pytestmark = needs_kernels
ONE_ROUNDING = 2.0**-8
"""bfloat16's eight bits: logits are rounded once, by at most half of this times their size, and so is their slope."""
SHAPES = [(1, 2, 2), (5, 34, 62), (7, 96, 1026), (13, 64, 2100)]
"""Rows, width, words: fewer than a vector, behind a panel, behind a block, behind two."""


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


def case(rows: int, width: int, words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, head, goals, room for logits."""
    source = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(size, width, generator=source).bfloat16() for size in (rows, words))
    goals = torch.randint(0, words, (rows,), generator=source)
    return hidden, weight, goals, hidden.new_empty(rows, words)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_hits_and_slopes_are_those_of_float64(shape):
    """The loss of the rounded logits to float32's last bits; the slope to one rounding of its terms."""
    hidden, weight, goals, room = case(*shape)
    slope = torch.empty_like(hidden)
    terms, hits = head_loss(hidden, weight, goals, room, slope)
    logits = (hidden.double() @ weight.double().t()).bfloat16().double()  # a tie of float32 and float64 is no case here
    assert torch.allclose(terms.double(), F.cross_entropy(logits, goals, reduction="none"), rtol=1e-5, atol=1e-5)
    assert torch.equal(hits.bool(), logits.argmax(-1) == goals)
    truth = (logits.softmax(-1) - F.one_hot(goals, shape[2])) @ weight.double()
    assert float((slope.double() - truth).norm()) <= ONE_ROUNDING * float(truth.norm().clamp_min(1e-3))
    alone, again = head_loss(hidden, weight, goals, room, None)
    assert torch.equal(alone, terms) and torch.equal(again, hits)


def test_the_first_of_equal_logits_is_the_answer():
    hidden, weight = torch.ones(3, 4).bfloat16(), torch.zeros(70, 4).bfloat16()
    weight[[20, 50]] = 1.0
    _, hits = head_loss(hidden, weight, torch.tensor([20, 50, 7]), hidden.new_empty(3, 70), None)
    assert hits.tolist() == [1, 0, 0]


def test_threads_change_no_bit_and_rows_stand_alone():
    hidden, weight, goals, room = case(13, 64, 2100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            slope = torch.empty_like(hidden)
            found.append((head_loss(hidden, weight, goals, room, slope)[0], slope))
        few = torch.empty_like(hidden[3:8])
        terms, _ = head_loss(hidden[3:8], weight, goals[3:8], room[3:8], few)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for part in found[1:] for one, other in zip(part, found[0], strict=True))
    assert torch.equal(terms, found[0][0][3:8]) and torch.equal(few, found[0][1][3:8])


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 2), (7, 34, 1038)], ids=str)
def test_nothing_is_read_or_written_beside_the_tensors(monkeypatch, library, shape, front):
    hidden, weight, goals, room = case(*shape)
    wanted, found = torch.empty_like(hidden), torch.empty_like(hidden)
    terms, hits = head_loss(hidden, weight, goals, room, wanted)
    guarded = Guarded(library, front=front)
    monkeypatch.setattr(native_loss, "pointer", guarded.pointer)
    before = native_build.choose(guarded)  # type: ignore[arg-type]
    try:
        again, others = head_loss(hidden, weight, goals, room, found)
    finally:
        native_build.choose(before)
    assert torch.equal(found, wanted) and torch.equal(again, terms) and torch.equal(others, hits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_the_loss(bad):
    hidden, weight, goals, room = case(5, 34, 62)
    hidden[2, 3] = bad
    slope = torch.empty_like(hidden)
    terms, _ = head_loss(hidden, weight, goals, room, slope)
    whole = torch.arange(5) != 2
    assert not terms[2].isfinite() and terms[whole].isfinite().all()
    assert not slope[2].isfinite().any() and slope[whole].isfinite().all()


def test_what_is_not_its_own_is_left_to_torch_or_refused():
    hidden, weight, goals, room = case(5, 34, 62)
    assert fits(hidden, weight)
    assert not fits(hidden.float(), weight) and not fits(hidden, weight.float())
    assert not fits(hidden, weight[:61]) and not fits(hidden[:, :33], weight[:, :33]) and not fits(hidden[:0], weight)
    with pytest.raises(IndexError, match="62 words"):
        head_loss(hidden, weight, goals + 62, room, None)
    for broken in ((goals[:4], room, None), (goals, room[:, :60], None), (goals, room, hidden[:4])):
        with pytest.raises(ValueError, match="5 rows"):
            head_loss(hidden, weight, *broken)
    native_build.choose(None)
    assert not fits(hidden, weight)


def loss_of(hidden: Tensor, head: LinearHead, goals: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    given = hidden.clone().requires_grad_()
    total, hits, _ = linear_cross_entropy(given, goals, head, smoothing=smoothing)
    total.backward()
    return total.detach(), hits, given.grad


def test_the_loss_of_a_bare_head_takes_it(monkeypatch):
    """In chunks too, and nowhere else: not with a cap, a scale, a bias, smoothing or a head that trains."""
    hidden, weight, goals, _ = case(40, 64, 1026)
    calls: list[int] = []
    inner = native_loss.head_loss
    monkeypatch.setattr(native_loss, "head_loss", lambda *words: (calls.append(len(words[0])), inner(*words))[1])
    native_build.choose(None)
    wanted = loss_of(hidden, LinearHead(weight), goals)
    native_build.choose(native_build.library())
    for chunk, parts in ((linear_loss.CHUNK_BYTES, [40]), (1, [16, 16, 8])):
        monkeypatch.setattr(linear_loss, "CHUNK_BYTES", chunk)
        calls.clear()
        total, hits, grad = loss_of(hidden, LinearHead(weight), goals)
        assert calls == parts and torch.equal(hits, wanted[1])
        assert torch.allclose(total, wanted[0], rtol=1e-4) and float((grad - wanted[2]).norm() / grad.norm()) < 0.01
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, goals, LinearHead(weight))[0], total)
    calls.clear()
    bias = torch.zeros(1026).bfloat16()
    for head in (
        LinearHead(weight, bias),
        LinearHead(weight, scale=2.0),
        LinearHead(weight, cap=30.0),
        LinearHead(nn.Parameter(weight)),
    ):
        loss_of(hidden, head, goals)
    loss_of(hidden, LinearHead(weight), goals, smoothing=0.1)
    assert not calls
