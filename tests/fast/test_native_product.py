"""Products by the kernel in C against float64, and the layers that go through it: adapters', frozen ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.fast import native_build, native_linear, native_mlp, native_product
from mmft.fast.lora_gated import ACTS, run_gated
from mmft.fast.lora_linear import Line, Stack, run_lines
from mmft.fast.native_product import product
from tests.fast.native import Guarded, every_number, kernels, needs_kernels, units

pytestmark = needs_kernels
ONE_ROUNDING = 2.0**-8
"""bfloat16 keeps eight bits: a float32 sum is rounded once, by half a unit, 2^-9 of a value."""
SHAPES = [(1, 2, 1), (5, 16, 15), (6, 34, 64), (7, 62, 65), (13, 98, 100), (40, 576, 192), (197, 64, 130)]
"""Rows, depth, columns: behind a tile, a vector and a panel, and before them."""


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """bfloat16 matrices of normal values."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).bfloat16() for shape in shapes]


def apart(found: Tensor, truth: Tensor) -> float:
    """Largest difference in units of one rounding of the terms' size."""
    found = found.detach()
    return float(((found.double() - truth).abs() / truth.abs().clamp_min(truth.abs().mean())).max()) / ONE_ROUNDING


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", [(), (2,), (4, 6)], ids=str)
def test_a_layer_and_its_adapters_are_one_sum(shape, ranks):
    rows, depth, columns = shape
    x, weight, bias = drawn((rows, depth), (columns, depth), (columns,))
    more = [tuple(drawn((rows, rank), (columns, rank), seed=rank)) for rank in ranks]
    found = product([(x, weight), *more], across=True, bias=bias)
    truth = bias.double() + sum(a.double() @ b.double().t() for a, b in [(x, weight), *more])
    assert found is not None and apart(found, truth) <= 1.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_of_several_layers_is_one_sum(shape):
    rows, columns, depth = shape
    depth += depth % 2
    terms = [tuple(drawn((rows, deep), (deep, columns), seed=deep)) for deep in (depth, depth + 2, 4)]
    found = product(terms, across=False)
    truth = sum(a.double() @ b.double() for a, b in terms)
    assert found is not None and apart(found, truth) <= 1.0


@pytest.mark.parametrize("across", [True, False])
def test_a_value_depends_on_its_row_and_column_alone(across):
    """Not on the number of threads, nor on the rows beside it: a picture says the same alone and in a batch."""
    a, b = drawn((50, 64), (130, 64) if across else (64, 130))
    whole = product([(a, b)], across=across)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(product([(a, b)], across=across), whole)
            assert torch.equal(product([(a[7:29], b)], across=across), whole[7:29])
    finally:
        torch.set_num_threads(before)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) without a difference of numbers that are alike."""
    return 0.5 * x * torch.special.erfc(-x / 2**0.5)


def tanh_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


@pytest.mark.parametrize("act", native_mlp.ACTS)
def test_an_act_is_torchs_over_all_numbers(act):
    """Of every bfloat16 (a product takes a denormal for 0): torch's bits but where the exponential falls to the other
    side, or where torch takes the difference of two numbers that are alike; a half unit from float64 where the formula
    rounds once."""
    x = every_number()
    x = x[x.abs() >= 2.0**-126]
    rows, pick = torch.stack((x, torch.zeros_like(x)), 1), torch.tensor([[1.0, 0.0]]).bfloat16()
    found = product([(rows, pick)], across=True, act=act)
    assert found is not None
    found, theirs = found[:, 0], native_mlp.ACTS[act](x)
    exact = {"erf_gelu": gelu, "tanh_gelu": tanh_gelu}.get(act)
    if exact is None:
        apart = units(found, theirs)
        assert apart.max() <= 1 and apart.ne(0).double().mean() < 1e-3
        return
    truth = exact(x.double())
    unit = 2.0 ** (torch.frexp(truth).exponent.double() - 8)
    far = ((found.double() - truth).abs() / unit)[truth.abs() > 1e-30]
    assert far.max() < 0.501 and (found - truth)[truth.abs() <= 1e-30].abs().max() < 1e-30
    plain = (x.abs() < 1e30) & (x.abs() > 1e-37) & ~((x < -3) & (x > -20))
    apart = units(found, theirs)[plain]
    assert apart.max() <= 1 and apart.ne(0).double().mean() < 1e-3
    assert (found - theirs)[(x < -3) & (x > -20)].abs().max() < 1e-4


@pytest.mark.parametrize("act", native_mlp.ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_act_follows_every_value_of_a_layer(shape, act):
    rows, depth, columns = shape
    x, weight, bias = drawn((rows, depth), (columns, depth), (columns,))
    found = product([(x, weight)], across=True, bias=bias, act=act)
    plain = product([(x, weight)], across=True, bias=bias)
    assert found is not None and plain is not None
    wanted = native_mlp.ACTS[act](plain)
    assert ((found - wanted).abs() <= 2.0**-7 * wanted.abs() + 1e-4).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", native_mlp.ACTS)
def test_what_is_no_number_passes_an_act_as_in_torch(act, bad):
    x, weight = torch.full((1, 2), bad).bfloat16(), torch.ones(1, 2).bfloat16()
    found = product([(x, weight)], across=True, act=act)
    torch.testing.assert_close(found, native_mlp.ACTS[act](x[:, :1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("shape", [(7, 62, 65), (6, 32, 64), (1, 2, 1)], ids=str)
def test_nothing_is_read_or_written_beside_the_tensors(monkeypatch, library, shape, across, front):
    rows, depth, columns = shape
    columns += 0 if across else columns % 2  # else rows of B would not be pairs, and torch's
    guarded = Guarded(library, front=front)
    terms = [tuple(drawn((rows, deep), (columns, deep) if across else (deep, columns))) for deep in (depth, 4)]
    bias = drawn((columns,))[0] if across else None
    wanted = product(terms, across=across, bias=bias, act="relu")
    lent = {id(one): guarded.pointer(one).value for term in terms for one in term}
    monkeypatch.setattr(native_product, "address", lambda x: lent[id(x)])
    monkeypatch.setattr(native_product, "pointer", guarded.pointer)
    before = native_build.choose(guarded)  # type: ignore[arg-type]
    try:
        found = product(terms, across=across, bias=bias, act="relu")
    finally:
        native_build.choose(before)
    assert torch.equal(found, wanted)


def test_what_is_not_its_own_is_left_to_torch():
    a, b = drawn((6, 8), (5, 8))
    assert product([(a.float(), b)], across=True) is None
    assert product([(a[:, :7], b[:, :7])], across=True) is None  # half a pair
    assert product([(a.t()[:6, :6], b)], across=True) is None
    assert product([(a[:0], b)], across=True) is None
    assert product([(a, b)], across=True, bias=torch.zeros(5)) is None
    native_build.choose(None)
    assert product([(a, b)], across=True) is None


def test_unlike_shapes_are_refused():
    a, b = drawn((6, 8), (5, 8))
    with pytest.raises(ValueError, match="unlike shapes"):
        product([(a, b)], across=True, bias=a[0, :4])
    for terms, across in (([(a, b[:, :6])], True), ([(a, b)], False), ([(a, b), (a[:5], b)], True)):
        with pytest.raises(ValueError, match="unlike shapes"):
            product(terms, across=across)


def test_what_is_no_number_reaches_the_output():
    a, b = drawn((9, 32), (20, 32))
    for bad in (float("nan"), float("inf")):
        for side in (a, b):
            side[3, 5] = bad
            found = product([(a, b)], across=True)
            assert not torch.isfinite(found[3] if side is a else found[:, 3]).any()
            side[3, 5] = 0.0


def line_of(width: int, out: int, rank: int, seed: int) -> Line:
    weight, a, b, bias = drawn((out, width), (rank, width), (out, rank), (out,), seed=seed)
    params = [nn.Parameter(one.float() * 0.3) for one in (a, b)]
    return Line(lambda dtype: weight.to(dtype), bias, *params, scaling=0.5)


def by(library_, run):
    before = native_build.choose(library_)
    try:
        return run()
    finally:
        native_build.choose(before)


def gradients(stacks, run, x, slopes, dtype):
    params = [one for stack in stacks for one in stack.params]
    for stack in stacks:
        stack.forget()
    outs = run(x.to(dtype), dtype)
    total = sum((out * slope.to(dtype)).sum() for out, slope in zip(outs, slopes, strict=True))
    return [*(out.detach() for out in outs), *torch.autograd.grad(total, [x, *params])]


@pytest.mark.parametrize("what", ["lines", "eight lines", "a gated block"])
def test_adapters_in_bfloat16_are_as_near_to_float32_as_torchs(library, what):
    """The whole chain, forward and every gradient, by kernels and by torch: the kernels round less often. Eight lines
    are more than one call takes, and go product by product."""
    if what == "a gated block":
        first = Stack([line_of(48, 80, 4, 0), line_of(48, 80, 6, 1)])
        second = Stack([line_of(80, 48, 2, 2)])
        stacks = [first, second]
        slopes = drawn((21, 48), seed=9)

        def run(x, dtype):
            return [run_gated(x, first, second, ACTS[0], dtype=dtype, training=True)]
    else:
        sizes = [(80, 4), (30, 6), (16, 2)] if what == "lines" else [(16 + 2 * number, 4) for number in range(8)]
        stacks = [Stack([line_of(48, *size, number) for number, size in enumerate(sizes)])]
        slopes = drawn(*((21, out) for out, _ in sizes), seed=9)

        def run(x, dtype):
            return run_lines(x, stacks[0], dtype=dtype, training=True)

    x = drawn((21, 48), seed=5)[0].float().requires_grad_()
    truth = by(None, lambda: gradients(stacks, run, x, slopes, torch.float32))
    theirs = by(None, lambda: gradients(stacks, run, x, slopes, torch.bfloat16))
    ours = by(library, lambda: gradients(stacks, run, x, slopes, torch.bfloat16))
    off = [
        [float((one - wanted).norm() / wanted.norm()) for one, wanted in zip(found, truth, strict=True)]
        for found in (ours, theirs)
    ]
    assert sum(off[0]) <= sum(off[1]), "on the whole"
    for one, other in zip(*off, strict=True):  # a half for the few hundred values of a tensor that fall by chance
        assert one <= 1.5 * other + 1e-4 and one < 0.02


class Block(nn.Module):
    """A layer below an adapter, a frozen one, one that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.small = nn.Linear(32, 48).bfloat16(), nn.Linear(32, 48).bfloat16()
        self.trained = nn.Linear(48, 16).bfloat16()
        self.holder = nn.Module()
        self.holder.base_layer = nn.Linear(4, 4).bfloat16()
        for one in (self.frozen, self.small, self.holder.base_layer):
            one.requires_grad_(False)


def test_frozen_layers_forward_and_backward():
    """In the place of torch's where there are rows enough, with the gradient of their input; and taken back."""
    torch.manual_seed(0)
    model = Block()
    layers = list(native_linear.put_in(model))
    assert layers == [model.frozen, model.small]
    x = torch.randn(2, 40, 32, dtype=torch.bfloat16, requires_grad=True)
    slope = torch.randn(2, 40, 48, dtype=torch.bfloat16)
    out = model.frozen(x)
    (dx,) = torch.autograd.grad(out, x, slope)
    weight, bias = model.frozen.weight.double(), model.frozen.bias.double()
    assert apart(out, F.linear(x.double(), weight, bias)) <= 1.0
    assert apart(dx, slope.double() @ weight) <= 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.frozen(x.float()), out)
    few = x[:, :3].detach()
    assert torch.equal(model.small(few), F.linear(few, model.small.weight, model.small.bias))
    native_linear.take_back(layers)
    assert type(model.frozen) is nn.Linear


def test_a_frozen_layer_keeps_nothing_but_its_weight():
    """The input of a frozen layer is not needed for its gradient."""
    model = Block()
    list(native_linear.put_in(model))
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.data_ptr()) or one, lambda one: one):
        model.frozen(x)
    assert kept == [model.frozen.weight.data_ptr()]
