"""A node of LoRA layers by one call of the kernels: bit for bit the product kernel's sums, adapters against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmft.fast import native_build, native_lines
from mmft.fast.lora_gated import ACTS, forward_gated
from mmft.fast.lora_linear import Line, Stack, forward_lines
from mmft.fast.native_lines import Given, Lines
from mmft.fast.native_product import product
from mmft.fast.native_rows import silu_times, silu_times_back
from tests.fast.native import Guarded, kernels, needs_kernels

pytestmark = needs_kernels
FLOAT_SUMS = 2.0**-20
"""Sums of a few hundred products in float32, in the length of the whole: 2^-24 for each of about sqrt(500) steps."""
SIZES = {"one": ((34, 2),), "three": ((64, 16), (130, 4), (66, 6)), "two": ((192, 16), (192, 16))}
"""(out, rank) of lines: narrower than a panel, behind one, several of them."""


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


def drawn(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source).bfloat16()


def made(width: int, sizes, *, bias: bool = True, seed: int = 0) -> tuple[Lines, Given]:
    """Lines and what they compute with."""
    source = torch.Generator().manual_seed(seed)
    lines = Lines(width, sizes, [0.5 + number for number in range(len(sizes))])
    weights, bs = zip(*((drawn(source, out, width), drawn(source, out, rank)) for out, rank in sizes), strict=True)
    biases = [drawn(source, out) if bias else None for out, _ in sizes]
    return lines, Given(drawn(source, lines.ranks, width), weights, biases, bs)


def both_ways(rows: int, sizes):
    """Lines of width 98 in both directions: they and what they compute with, x, the slopes of the outputs, x A^T, the
    outputs, the gradients, and the product kernel's d = dy B."""
    lines, given = made(98, sizes)
    source = torch.Generator().manual_seed(1)
    x, ahead = drawn(source, rows, 98), [drawn(source, rows, out) for out, _ in sizes]
    narrow, outs = native_lines.forward(lines, x, given)
    slopes = native_lines.backward(lines, x, narrow, given, ahead, wants_x=True)
    steep = torch.cat([product([(one, b)], across=False) for one, b in zip(ahead, given.bs, strict=True)], 1)
    return lines, given, x, ahead, narrow, outs, slopes, steep


def far(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


@pytest.mark.parametrize("rows", [1, 7, 45])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_and_dx_are_the_product_kernels(rows, sizes):
    lines, given, x, ahead, narrow, outs, slopes, steep = both_ways(rows, sizes)
    assert torch.equal(narrow, product([(x, given.a)], across=True))
    parts = narrow.split([rank for _, rank in sizes], 1)
    for out, weight, bias, part, b in zip(outs, given.weights, given.biases, parts, given.bs, strict=True):
        assert torch.equal(out, product([(x, weight), (part, b)], across=True, bias=bias))
    wanted = product([*zip(ahead, given.weights, strict=True), (steep, given.a)], across=False)
    assert torch.equal(slopes.dx, wanted)
    assert native_lines.backward(lines, x, narrow, given, ahead, wants_x=False).dx is None


@pytest.mark.parametrize("rows", [1, 7, 45, 448])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients_of_adapters_are_those_of_float64(rows, sizes):
    """From the rounded narrow products on, in sums of float32 that nothing rounds."""
    lines, _, x, ahead, narrow, _, slopes, steep = both_ways(rows, sizes)
    assert slopes.da.dtype == torch.float32 and far(slopes.da, steep.double().t() @ x.double()) < FLOAT_SUMS
    parts = narrow.split([rank for _, rank in sizes], 1)
    for db, one, part, scale in zip(slopes.dbs, ahead, parts, lines.scalings, strict=True):
        assert db.dtype == torch.float32 and far(db, scale * one.double().t() @ part.double()) < FLOAT_SUMS


def block(rows: int, width: int = 48, wide: int = 130):
    """Lines of a gated block, what they compute with, its input and the slope of its output."""
    first, one = made(width, ((wide, 4), (wide, 6)), bias=False)
    second, other = made(wide, ((width, 2),), bias=False, seed=5)
    source = torch.Generator().manual_seed(3)
    return (first, second), (one, other), drawn(source, rows, width), drawn(source, rows, width)


@pytest.mark.parametrize("rows", [1, 8, 45])
def test_a_gated_block_is_its_layers_one_after_the_other(rows):
    """The same bits as both stacks and the gate by themselves, in both directions."""
    two, given, x, ahead = block(rows)
    narrow, (gate, up, out) = native_lines.forward_gated(two, x, given)
    first, (left, right) = native_lines.forward(two[0], x, given[0])
    opened = silu_times(left, right)
    second, (wanted,) = native_lines.forward(two[1], opened, given[1])
    for one, other in zip((*narrow, gate, up, out), (first, second, left, right, wanted), strict=True):
        assert torch.equal(one, other)
    slopes = native_lines.backward_gated(two, x, narrow, given, (gate, up), ahead, wants_x=True)
    below = native_lines.backward(two[1], opened, second, given[1], [ahead], wants_x=True)
    to_factors = silu_times_back(gate, up, below.dx)
    above = native_lines.backward(two[0], x, first, given[0], to_factors, wants_x=True)
    assert torch.equal(slopes[0].dx, above.dx)
    for one, other in zip(slopes, (above, below), strict=True):
        assert torch.equal(one.da, other.da)
        assert all(torch.equal(a, b) for a, b in zip(one.dbs, other.dbs, strict=True))


def test_threads_change_no_bit():
    two, given, x, ahead = block(45)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            narrow, outs = native_lines.forward_gated(two, x, given)
            slopes = native_lines.backward_gated(two, x, narrow, given, (outs[0], outs[1]), ahead, wants_x=True)
            found.append([*outs, *(one for part in slopes for one in (part.dx, part.da, *part.dbs))])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0][:3], others[:3], strict=True))
        assert all(torch.equal(one, other) for one, other in zip(found[0][3:], others[3:], strict=True))


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("rows", [1, 13])
def test_nothing_is_read_or_written_beside_the_tensors(monkeypatch, library, rows, front):
    """Every tensor and the panels end (or begin) at a page that nobody may touch."""
    two, given, x, ahead = block(rows, width=34, wide=66)
    lines, more = made(34, SIZES["three"])
    slopes_of = [drawn(torch.Generator().manual_seed(4), rows, out) for out, _ in SIZES["three"]]

    def run() -> list[Tensor]:
        narrow, outs = native_lines.forward_gated(two, x, given)
        both = native_lines.backward_gated(two, x, narrow, given, (outs[0], outs[1]), ahead, wants_x=True)
        thin, plain = native_lines.forward(lines, x, more)
        back = native_lines.backward(lines, x, thin, more, slopes_of, wants_x=True)
        return [*outs, *plain, *(one for part in (*both, back) for one in (part.dx, part.da, *part.dbs))]

    wanted, guarded, lent = run(), Guarded(library, front=front), {}

    def address(one: Tensor) -> int:
        if not guarded._lent:  # the call before is over
            lent.clear()
        if one.data_ptr() not in lent:
            lent[one.data_ptr()] = guarded.pointer(one).value
        return lent[one.data_ptr()]

    monkeypatch.setattr(native_lines, "address", address)
    before = native_build.choose(guarded)  # type: ignore[arg-type]
    try:
        found = run()
    finally:
        native_build.choose(before)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_is_not_its_own_is_left_to_torch():
    lines, given = made(32, ((16, 4),))
    x = drawn(torch.Generator().manual_seed(0), 5, 32)
    assert native_lines.forward(lines, x, given) is not None
    assert native_lines.forward(lines, x.float(), given) is None
    assert native_lines.forward(lines, drawn(torch.Generator(), 32, 5).t(), given) is None
    assert native_lines.forward(lines, x[:0], given) is None
    assert native_lines.forward(lines, x[:, :30], given) is None
    for width, sizes in ((32, ((16, 3),)), (32, ((15, 4),)), (31, ((16, 4),)), (32, ((16, 2),) * 8)):
        odd, theirs = made(width, sizes)
        assert native_lines.forward(odd, drawn(torch.Generator(), 5, width), theirs) is None
    narrow, outs = native_lines.forward(lines, x, given)
    assert native_lines.backward(lines, x, narrow, given, [outs[0].float()], wants_x=True) is None
    assert native_lines.backward(lines, x, narrow[:, :2], given, outs, wants_x=True) is None
    two, of_two, rows, _ = block(5)
    assert native_lines.forward_gated((two[1], two[0]), rows, of_two) is None
    unlike, theirs = made(48, ((130, 4), (128, 6)), bias=False)
    assert native_lines.forward_gated((unlike, two[1]), rows, (theirs, of_two[1])) is None
    native_build.choose(None)
    assert native_lines.forward(lines, x, given) is None


def line_of(width: int, out: int, rank: int) -> Line:
    weight = torch.randn(out, width).bfloat16()
    return Line(weight.to, None, nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.randn(out, rank)), 2.0)


def test_layers_take_one_call_and_a_copy_makes_its_own(monkeypatch):
    """Through the nodes; a copied stack points into its own structures."""
    torch.manual_seed(0)
    stack, down = Stack([line_of(32, 64, 4), line_of(32, 64, 4)]), Stack([line_of(64, 32, 4)])
    calls: list[str] = []
    inner = native_lines._run
    monkeypatch.setattr(native_lines, "_run", lambda name, *rest: (calls.append(name), inner(name, *rest))[1])
    x = drawn(torch.Generator().manual_seed(0), 9, 32)
    outs, _ = forward_lines(x, stack, training=True)
    again, _ = forward_lines(x, copy.deepcopy(stack), training=True)
    forward_gated(x, (stack, down), ACTS[0], training=True)
    assert calls == ["mmft_lines", "mmft_lines", "mmft_gated"]
    assert all(torch.equal(one, other) for one, other in zip(outs, again, strict=True))
    assert copy.deepcopy(stack).of_kernels._stack.lines != stack.of_kernels._stack.lines
