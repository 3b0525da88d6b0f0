"""Attention by the kernels in C against float64, and against what this package computes without them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmft.fast import native_attention, native_build, native_kernels
from mmft.fast.attention import grouped_attention
from mmft.fast.line_attention import groups_of, line_attention
from mmft.fast.native_attention import fits, native_line
from tests.fast.native import LINES, a_line, alone, doubled, errors, kernels, needs_kernels, with_gradients
from tests.runs import environment

pytestmark = needs_kernels
WHOLE, WORST = 0.004, 0.03
"""Bounds of the error of a tensor and of its worst vector; bfloat16 keeps 8 bits: half a unit is 0.002 to 0.004."""


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


def compared(table, *, causal=True, **how):
    """Errors of output and gradients by the kernel, and by `line_attention` (which is causal)."""
    *inputs, slope = a_line(table[-1][1], **how)
    truth = doubled(inputs)
    wanted = with_gradients(alone(*truth, table, scale=0.3, causal=causal), truth, slope.double())
    ours = with_gradients(native_line(*inputs, table, scale=0.3, causal=causal), inputs, slope)
    theirs = with_gradients(line_attention(*inputs, groups_of(tuple(table)), scale=0.3), inputs, slope)
    return [[errors(one, other) for one, other in zip(found, wanted, strict=True)] for found in (ours, theirs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LINES)
def test_values_and_gradients_are_those_of_float64(name, causal):
    ours, theirs = compared(LINES[name], causal=causal)
    for (whole, worst), (other, _) in zip(ours, theirs, strict=True):
        assert whole <= WHOLE and worst <= WORST, (ours, theirs)
        assert not causal or whole <= 1.1 * other + 1e-4, (ours, theirs)


@pytest.mark.parametrize("widths", [(16, 16), (48, 48), (64, 64), (80, 80), (128, 128), (48, 16), (64, 112)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
def test_of_every_width_and_grouping(heads, widths):
    ours, theirs = compared(LINES["two beginnings and a row"], heads=heads, widths=widths)
    for (whole, worst), (other, _) in zip(ours, theirs, strict=True):
        assert whole <= WHOLE and worst <= WORST and whole <= 1.1 * other + 1e-4, (ours, theirs)


@pytest.mark.parametrize("causal", [True, False])
def test_scores_that_are_far_apart(causal):
    """By hundreds: e^score overflows where it is not that of the difference to the greatest, wherever that one is."""
    query, key, value, _ = a_line(203, widths=(32, 32))
    truth = alone(query.double(), key.double(), value.double(), [(0, 203, 0, 0)], scale=20.0, causal=causal)
    found = native_line(query, key, value, [(0, 203, 0, 0)], scale=20.0, causal=causal)
    whole, worst = errors(found, truth)
    assert whole <= WHOLE and worst <= WORST


@pytest.mark.parametrize("name", ["rests of a beginning", "two beginnings and a row"])
def test_p_made_again_is_p_kept(name, monkeypatch):
    *inputs, slope = a_line(LINES[name][-1][1], widths=(64, 48))
    kept = with_gradients(native_line(*inputs, LINES[name], scale=0.3), inputs, slope)
    monkeypatch.setattr(native_attention, "KEPT_KEYS", 0)
    again = with_gradients(native_line(*inputs, LINES[name], scale=0.3), inputs, slope)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_where_tokens_and_heads_lie_does_not_matter():
    table = LINES["rests of a beginning"]
    *inputs, slope = a_line(66)
    assert not inputs[0].is_contiguous()
    plain = with_gradients(native_line(*inputs, table, scale=0.3), inputs, slope)
    inside = torch.zeros(1, 70, 10, 16, dtype=torch.bfloat16)
    inside[:, 3:69, 1::2][:, :, :2] = inputs[1].detach().transpose(1, 2)
    others = [
        [one.detach().contiguous().requires_grad_() for one in inputs],
        [inputs[0], inside[:, 3:69, 1::2][:, :, :2].transpose(1, 2).requires_grad_(), inputs[2]],
        [one.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for one in inputs],
    ]
    for other in others:
        found = with_gradients(native_line(*other, table, scale=0.3), other, slope)
        assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))
    strange = slope.transpose(1, 2).contiguous().transpose(1, 2)
    found = with_gradients(native_line(*inputs, table, scale=0.3), inputs, strange)
    assert all(torch.equal(one, two) for one, two in zip(found, plain, strict=True))


def test_the_number_of_threads_changes_no_bit():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            *inputs, slope = a_line(947, widths=(64, 64))
            out = native_line(*inputs, LINES["beyond what is kept"], scale=0.3)
            found.append(with_gradients(out, inputs, slope))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_reaches_the_output(which, bad):
    """The guard against losses that are not finite looks at the loss alone."""
    table = ((0, 9, 0, 0), (9, 20, 0, 0))
    *inputs, slope = a_line(20)
    inputs = [one.detach().clone() for one in inputs]
    inputs[which][0, 1, 12, 3] = bad
    inputs = [one.requires_grad_() for one in inputs]
    out, *gradients = with_gradients(native_line(*inputs, table, scale=0.3), inputs, slope)
    heads = slice(1, 2) if which == 0 else slice(3, 6)
    assert (
        not torch.isfinite(out[0, 12, heads]).all(-1).any() if which != 1 else not torch.isfinite(out[0, 12:, 3:]).all()
    )
    assert torch.isfinite(out[0, :9]).all() and torch.isfinite(out[0, :, 0]).all()
    assert not all(torch.isfinite(one).all() for one in gradients)


def test_what_fits(library):
    def rows(*shape, dtype=torch.bfloat16, device="cpu"):
        return torch.empty(shape, dtype=dtype, device=device)

    query, key = rows(1, 4, 8, 32), rows(1, 2, 8, 32)
    assert fits(query, key, key) and fits(query, key, rows(1, 2, 8, 16))
    refused = {
        "float32": (query.float(), key.float(), key.float()),
        "values of another type": (query, key, key.float()),
        "a width that is no vector": (rows(1, 4, 8, 24), rows(1, 2, 8, 24), key),
        "values of a width that is no vector": (query, key, rows(1, 2, 8, 24)),
        "keys of another width": (query, rows(1, 2, 8, 16), key),
        "heads that do not divide": (rows(1, 3, 8, 32), key, key),
        "more keys": (query, rows(1, 2, 9, 32), rows(1, 2, 9, 32)),
        "fewer values": (query, key, rows(1, 2, 7, 32)),
        "values of fewer heads": (query, key, rows(1, 1, 8, 32)),
        "another batch": (query, rows(2, 2, 8, 32), rows(2, 2, 8, 32)),
        "nothing": (rows(1, 4, 0, 32), rows(1, 2, 0, 32), rows(1, 2, 0, 32)),
        "another device": tuple(one.to("meta") for one in (query, key, key)),
    }
    assert [name for name, given in refused.items() if fits(*given)] == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fits(query.float(), key, key.float()) and not fits(query.double(), key.double(), key.double())
        out = native_line(*(one.float() for one in a_line(8)[:3]), [(0, 8, 0, 0)], scale=0.3)
        assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert not fits(query, key, key)
    native_build.choose(None)
    assert not fits(query, key, key)


@pytest.mark.parametrize("segment", [(0, 9, 0, 0), (0, 8, 0, 9), (4, 3, 0, 0), (-1, 8, 0, 0), (2, 8, 3, 4)])
def test_a_segment_outside_of_the_line_is_refused(segment):
    with pytest.raises(ValueError, match="no segment"):
        native_line(*a_line(8)[:3], [segment], scale=0.3)


def test_its_layer_can_be_recomputed():
    *inputs, slope = a_line(66)
    table = LINES["rests of a beginning"]
    again = checkpoint(lambda *rows: native_line(*rows, table, scale=0.3), *inputs, use_reentrant=False)
    pairs = zip(
        with_gradients(again, inputs, slope),
        with_gradients(native_line(*inputs, table, scale=0.3), inputs, slope),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


CALLS = (
    {},
    {"scaling": 0.7},
    {"is_causal": False},
    {"length": 600, "is_causal": False},
    {"dropout": 0.5},
    {"bias": True},
    {"masked": True},
    {"queries": 1},
    {"queries": 2},
    {"width": 8},
    {"dtype": torch.float32},
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_is_that_of_sdpa(call, monkeypatch):
    """What the kernel takes is within bfloat16 of what transformers asks for; all else goes to `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        "sdpa",
        lambda *given, **options: asked.append(options) or sdpa_attention_forward(*given, **options),
    )
    given, source = dict(call), torch.Generator().manual_seed(1)
    length, width, dtype = given.pop("length", 9), given.pop("width", 32), given.pop("dtype", torch.bfloat16)
    queries = given.pop("queries", length)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    shapes = ((2, 6, queries, width), (2, 2, length, width), (2, 2, length, width))
    rows = [torch.randn(shape, generator=source).to(dtype).requires_grad_() for shape in shapes]
    if given.pop("bias", False):
        given["position_bias"] = torch.randn((1, 6, length, length), generator=source).to(dtype)
    mask = torch.eye(length, dtype=torch.bool).expand(2, 1, -1, -1) if given.pop("masked", False) else None
    outs = []
    for run in (sdpa_attention_forward, native_kernels.attention_forward):
        torch.manual_seed(0)
        out = run(module, *rows, mask, **given)[0]
        outs.append(with_gradients(out, rows, torch.ones_like(out)))
    others = {"dropout", "bias", "masked", "queries", "width", "dtype"} & call.keys()
    assert bool(asked) == bool(others)
    for ours, theirs in zip(outs[1], outs[0], strict=True):
        assert ours.shape == theirs.shape
        if others:
            assert torch.equal(ours, theirs)
        else:
            assert errors(ours, theirs.double())[0] < 0.006  # both are rounded
    with pytest.raises(ValueError, match="softcap"):
        native_kernels.attention_forward(module, *rows, mask, softcap=5.0)


def test_what_the_kernel_does_not_take_goes_to_products_where_those_were_chosen(monkeypatch):
    from mmft.fast import attention

    query, key, value, _ = a_line(9)
    monkeypatch.setattr(attention._Choice, "products", True)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    native_kernels.products.register()
    out = native_kernels.attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    assert torch.equal(out, grouped_attention(query, key, value, mask=mask, scale=0.3).transpose(1, 2))


SCRIPT = """
import ctypes
import sys
import torch
from mmft.fast import native_attention, native_build, native_rows
from tests.fast.native import LINES, Guarded, a_line, draw, with_gradients

for front in (False, True):
    guarded = Guarded(native_build.library(), front=front)
    native_build.choose(guarded)
    native_attention.pointer = native_rows.pointer = guarded.pointer
    for name, table in LINES.items():
        for causal in (True, False):
            for widths in ((16, 48), (80, 16)):
                *inputs, slope = a_line(table[-1][1], heads=(3, 1), widths=widths)
                out = native_attention.native_line(*inputs, table, scale=0.3, causal=causal)
                found = with_gradients(out, inputs, slope)
                assert all(bool(torch.isfinite(one).all()) for one in found)
    for width in (1, 15, 16, 17, 63, 100):
        for count in (0, 1, 3):
            x, given, weight = (one.detach() for one in draw([(count, width), (count, width), (width,)]))
            out, rate = native_rows.norm(x, weight, 1e-5)
            native_rows.norm_back(given, x, weight, rate)
            native_rows.silu_times(x, given)
            native_rows.silu_times_back(x, given, x.clone())
if sys.argv[1] == "too far":
    guarded.mmft_gate(*(guarded.pointer(one) for one in (x, given, out)), ctypes.c_long(x.numel() + 4096), 1)
sys.stdout.write("clean")
"""


@pytest.mark.parametrize("how", ["as it is", "too far"])
def test_nothing_is_touched_behind_or_before_a_tensor(how):
    """In a process of its own, which a wrong touch ends; the second shows that it does."""
    words = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == ((0, "clean") if how == "as it is" else (-11, "")), done.stderr[-2000:]
