"""Norms and gated products by the kernels in C against torch's own in bfloat16, and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmft.fast import native_build, native_rows
from mmft.fast.lora_gated import ACTS
from mmft.fast.norms import rms_norm
from tests.fast.native import draw, every_number, kernels, needs_kernels, units

pytestmark = needs_kernels
SIZES = [(1, 1), (3, 15), (5, 16), (7, 17), (2, 63), (64, 576), (33, 100)]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


def by_torch(run):
    """A call without kernels."""
    before = native_build.choose(None)
    try:
        return run()
    finally:
        native_build.choose(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_norm_is_torchs(size):
    """The squares are summed in another order, in float32: a value between two bfloat16 may fall to the other side, by
    one unit before the weight and by two behind it, and few do."""
    x, weight, given = (one.detach() for one in draw([size, size[1:], size]))
    for w, most in ((torch.ones_like(weight), 1), (weight, 2)):
        found = native_rows.norm(x, w, 1e-5)
        assert found is not None
        out, rate = found
        theirs = by_torch(lambda w=w: rms_norm(x, w, 1e-5))
        apart = units(out, theirs)
        assert apart.max() <= most and apart.ne(0).double().mean() < 0.01
        exact = x.double().square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        torch.testing.assert_close(rate.double(), exact, rtol=1e-6, atol=0)  # float32: 6e-8 an operation
        back = native_rows.norm_back(given, x, w, rate)
        wide = x.double().requires_grad_()
        truth = (wide * wide.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * w.double() * given).sum()
        (wanted,) = torch.autograd.grad(truth, wide)
        leaf = x.clone().requires_grad_()
        (other,) = by_torch(lambda w=w, leaf=leaf: torch.autograd.grad(rms_norm(leaf, w, 1e-5), leaf, given))
        assert back is not None
        assert (back - wanted).norm() <= 1.02 * (other - wanted).norm() + 1e-6
        assert (back - wanted).norm() <= 0.005 * wanted.norm() + 1e-4  # one feature: x r is all but constant


def test_a_norms_node_takes_the_kernel_and_feels_eps():
    x, weight, slope = draw([(6, 3, 40), (40,), (6, 3, 40)])
    out = rms_norm(x, weight.detach(), 0.5)
    (gradient,) = torch.autograd.grad(out, x, slope)
    again = native_rows.norm(x.detach(), weight.detach(), 0.5)
    assert again is not None and torch.equal(out, again[0])
    assert torch.equal(gradient, native_rows.norm_back(slope.detach(), x.detach(), weight.detach(), again[1]))
    assert not torch.equal(out, rms_norm(x, weight.detach(), 1e-5))
    strange = slope.transpose(0, 1).contiguous().transpose(0, 1)  # torch's way, from the kernel's rates
    (other,) = torch.autograd.grad(rms_norm(x, weight.detach(), 0.5), x, strange)
    assert (other - gradient).abs().max() <= 0.01 * gradient.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    x, weight = (one.detach() for one in draw([(3, 40), (40,)]))
    x[1, 7] = bad
    out, rate = native_rows.norm(x, weight, 1e-5)
    assert not torch.isfinite(out[1, 7]) and torch.isfinite(out[[0, 2]]).all()
    assert not torch.isfinite(native_rows.norm_back(x, x, weight, rate)[1]).all()
    opened = native_rows.silu_times(x, torch.ones_like(x))
    assert not torch.isfinite(opened[1, 7]) and torch.isfinite(opened[[0, 2]]).all()
    assert not torch.isfinite(native_rows.silu_times_back(x, torch.ones_like(x), torch.ones_like(x))[1][1, 7])


def test_the_exponential_over_its_whole_range():
    """The gate with `up = 1` of every bfloat16: half a unit from float64 (and a thousandth for the exponential), down
    to where 1 + e^-x overflows in float32."""
    gate = every_number()
    out = native_rows.silu_times(gate, torch.ones_like(gate))
    truth = gate.double() * torch.sigmoid(gate.double())
    assert out is not None
    lies = gate > -88
    unit = (2.0 ** (torch.frexp(truth).exponent.double() - 8)).clamp_min(2.0**-133)
    assert ((out.double() - truth).abs() / unit)[lies].max() < 0.501
    assert out[~lies].abs().max() < 1e-36 and torch.isfinite(out).all()
    apart = units(out, F.silu(gate))
    assert apart[lies].max() <= 1 and apart[lies].ne(0).double().mean() < 1e-3


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_a_gate_is_torchs(count):
    """A value of the exponential's may fall to the other side of two bfloat16: one unit, two behind the product."""
    gate, up, given = (one.detach() * 3 for one in draw([(count,), (count,), (count,)]))
    product = native_rows.silu_times(gate, up)
    assert product is not None
    apart = units(product, F.silu(gate).mul_(up))
    assert apart.numel() == count and apart.ne(0).sum() <= 0.002 * count and (not count or apart.max() <= 2)
    to_gate, to_up = native_rows.silu_times_back(gate, up, given.clone()) or ()
    wanted = by_torch(lambda: ACTS[0].back(gate, up, given.clone(), F.silu(gate)))
    for ours, theirs in zip((to_gate, to_up), wanted, strict=True):
        apart = units(ours, theirs)
        small = theirs.abs() < 1e-3  # near the foot of SiLU the slope is a difference of two numbers
        assert apart.ne(0).sum() <= 0.01 * count and (small | (apart <= 2)).all()
        assert (ours - theirs)[small].abs().max() < 1e-5 if small.any() else True


def test_an_act_goes_on_with_torch_for_what_is_not_the_kernels():
    gate, up, given = (one.detach() for one in draw([(6, 40)] * 3))
    silu, tanh = ACTS[0], ACTS[1]
    product, opened = silu.times(gate, up, again=True)
    assert opened is None and torch.equal(product, native_rows.silu_times(gate, up))
    ours = silu.back(gate, up, given.clone(), opened)
    assert all(
        torch.equal(*pair) for pair in zip(ours, native_rows.silu_times_back(gate, up, given.clone()), strict=True)
    )
    product, opened = silu.times(gate.float(), up.float(), again=True)
    assert opened is not None and torch.equal(product, F.silu(gate.float()) * up.float())
    product, opened = tanh.times(gate, up, again=True)
    assert torch.equal(product, F.gelu(gate, approximate="tanh") * up) and opened is not None
    strange = given.t().contiguous().t()  # the kernel made the product, and cannot take its slope
    for one, other in zip(silu.back(gate, up, strange, None), ours, strict=True):
        assert (units(one, other) <= 2).double().mean() > 0.99


def test_what_is_refused():
    x, weight = (one.detach() for one in draw([(4, 32), (32,)]))
    rate = torch.ones(4, 1)
    refused = {
        "float32": native_rows.norm(x.float(), weight.float(), 1e-5),
        "a weight in float32": native_rows.norm(x, weight.float(), 1e-5),
        "a weight of another width": native_rows.norm(x, weight[:1], 1e-5),
        "columns": native_rows.norm(x.t(), weight[:4], 1e-5),
        "a slope of another shape": native_rows.norm_back(x[:1], x, weight, rate),
        "a slope in columns": native_rows.norm_back(x.t().contiguous().t(), x, weight, rate),
        "another gate": native_rows.silu_times(x[:1], x),
        "a gate in float32": native_rows.silu_times(x.float(), x.float()),
        "a gate's slope of another shape": native_rows.silu_times_back(x, x, x[:1]),
        "another device": native_rows.silu_times(x.to("meta"), x.to("meta")),
    }
    assert [name for name, found in refused.items() if found is not None] == []
    assert by_torch(lambda: native_rows.norm(x, weight, 1e-5)) is None


def test_the_number_of_threads_changes_no_bit():
    x, weight, given = (one.detach() for one in draw([(65, 576), (576,), (65, 576)]))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, rate = native_rows.norm(x, weight, 1e-5)
            back = native_rows.norm_back(given, x, weight, rate)
            gates = native_rows.silu_times_back(x, given, out.clone())
            found.append([out, rate, back, native_rows.silu_times(x, given), *gates])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
