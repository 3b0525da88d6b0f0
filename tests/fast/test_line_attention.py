"""Attention of a line against torch's own kernel on every row alone, values and gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmft.fast.line_attention import Group, groups_of, line_attention

LINES = {
    "one row": [(0, 5, 0, 0)],
    "rows of nearly one length": [(0, 100, 0, 0), (100, 196, 0, 0), (196, 300, 0, 0)],
    "long and short": [(0, 3, 0, 0), (3, 290, 0, 0), (290, 291, 0, 0)],
    "rests of a beginning": [(0, 40, 0, 0), (40, 52, 0, 40), (52, 65, 0, 40), (65, 66, 0, 40)],
    "two beginnings and a row": [
        (0, 9, 0, 0),
        (9, 140, 0, 9),
        (140, 150, 0, 0),
        (150, 160, 0, 0),
        (160, 170, 150, 160),
    ],
    "beyond what is kept": [(0, 530, 0, 0), (530, 1055, 0, 0)],
}


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: list[tuple[int, ...]]) -> torch.Tensor:
    """(1, T, H, D): every row by torch's kernel, with its beginning before it."""
    parts = []
    for start, end, first, last in table:
        places = torch.cat((torch.arange(first, last), torch.arange(start, end)))
        seen = torch.arange(len(places))[None] <= torch.arange(last - first, len(places))[:, None]
        inputs = (query[:, :, start:end], key[:, :, places], value[:, :, places])
        parts.append(F.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=0.3, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("name", LINES)
def test_values_and_gradients_are_those_of_rows_alone(name):
    table, source = LINES[name], torch.Generator().manual_seed(1)
    tokens = table[-1][1]
    shapes = [(1, tokens, heads, width) for heads, width in ((6, 8), (2, 8), (2, 4))]
    wide = [torch.randn(s, generator=source, dtype=torch.float64).transpose(1, 2).requires_grad_() for s in shapes]
    slope = torch.randn((1, tokens, 6, 4), generator=source, dtype=torch.float64)
    found, wanted = line_attention(*wide, groups_of(tuple(table)), scale=0.3), alone(*wide, table)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # float64: rounding alone
    pairs = zip(torch.autograd.grad(found, wide, slope), torch.autograd.grad(wanted, wide, slope), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_every_token_lies_in_one_group():
    for table in LINES.values():
        places = [at for group in groups_of(tuple(table)) for start, end in group.spans for at in range(start, end)]
        assert sorted(places) == list(range(table[-1][1]))


def test_rows_of_another_length_are_another_group():
    table = ((0, 100, 0, 0), (100, 190, 0, 0), (190, 270, 0, 0), (270, 300, 0, 270))
    first, second, third = groups_of(table)
    assert first == Group(((0, 100), (100, 190)), (0, 0)) and first.length == 112  # a multiple of 16
    assert second.spans == ((190, 270),) and second.length == 80
    assert third == Group(((270, 300),), (0, 270)) and third.length == 30
    assert first.blocks() == [(0, 112)] and Group(((0, 300),), (0, 0)).blocks() == [(0, 128), (128, 256), (256, 304)]


def test_under_autocast_it_computes_in_that_type():
    rows = [torch.randn(1, heads, 7, 16) for heads in (4, 2, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert line_attention(*rows, groups_of(((0, 7, 0, 0),)), scale=0.25).dtype == torch.bfloat16


def test_its_layer_can_be_recomputed():
    table, source = LINES["rests of a beginning"], torch.Generator().manual_seed(2)
    wide = [torch.randn((1, heads, 66, 8), generator=source).requires_grad_() for heads in (4, 2, 2)]

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        return line_attention(*inputs, groups_of(tuple(table)), scale=0.3)

    again = checkpoint(attend, *wide, use_reentrant=False)
    for ours, theirs in zip(
        torch.autograd.grad(again.square().sum(), wide),
        torch.autograd.grad(attend(*wide).square().sum(), wide),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
