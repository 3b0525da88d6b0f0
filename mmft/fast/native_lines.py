"""A node of LoRA layers by the kernels of `native/lines.c`: everything it computes in one call in each direction.

Beside the product kernel's sums (`native_product`), the narrow products of the adapters, which are a few hundredths of
the work and a quarter of its time by torch (a dozen small products a layer, each with its call), run inside the call;
gradients of A and B come out of float32 sums, and the gated product is made tile by tile while its factors lie in the
cache. None comes back where kernels are not chosen or a tensor is not theirs. Price: two narrow copies in backward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmft.fast.native_build import chosen, whole
from mmft.fast.native_product import address, panels

MOST = 7
"""Lines of one input."""


class _Line(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "b", "given", "out", "db")),
        *((name, ctypes.c_int64) for name in ("columns", "rank")),
        ("scale", ctypes.c_float),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "a", "narrow", "steep", "turned", "dx", "da", "lines")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "ranks", "count")),
    ]


class _Gates(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "given", "product", "to_gate", "to_up")),
        ("columns", ctypes.c_int64),
    ]


def _theirs(x: Tensor, *shape: int) -> bool:
    return x.shape == shape and whole(x)


def _at(x: Tensor | None) -> int:
    return 0 if x is None else address(x)


@dataclass(frozen=True)
class Given:
    """What the lines of an input compute with, in bfloat16: the stacked A (ranks, in), and of each line the weight
    (out, in), the bias (out,) and B (out, rank) with its scaling in it."""

    a: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    bs: Sequence[Tensor]


@dataclass(frozen=True)
class Slopes:
    """Gradients of a node: of its input, of its stacked A (ranks, in) and of every B (out, rank), these in float32."""

    dx: Tensor | None
    da: Tensor
    dbs: list[Tensor]
    room: list[Tensor] = field(default_factory=list)


class Lines:
    """The structures of the lines of one input, made once and filled for every call. `sizes`: (out, rank) of each."""

    def __init__(self, width: int, sizes: Sequence[tuple[int, int]], scalings: Sequence[float]) -> None:
        self.width, self.sizes, self.scalings = width, tuple(sizes), tuple(scalings)
        self.ranks = sum(rank for _, rank in sizes)
        self._fits = len(sizes) <= MOST and not any(size % 2 for one in ((width,), *sizes) for size in one)
        self._lines = (_Line * len(sizes))(
            *(_Line(columns=one[0], rank=one[1], scale=scale) for one, scale in zip(sizes, scalings, strict=True))
        )
        where = ctypes.addressof(self._lines)
        self._stack = _Stack(lines=where, width=width, ranks=self.ranks, count=len(sizes))
        self.depth = max(width, sum(out for out, _ in sizes)) + self.ranks

    def __reduce__(self) -> tuple[Any, ...]:
        """Structures point into this process: a copy makes its own."""
        return Lines, (self.width, self.sizes, self.scalings)

    def fit(self, x: Tensor, given: Given) -> bool:
        """Whether kernels can take them."""
        if not self._fits or x.dim() != 2 or not len(x) or not _theirs(x, len(x), self.width):
            return False
        for (out, rank), weight, bias, b in zip(self.sizes, given.weights, given.biases, given.bs, strict=True):
            if not _theirs(weight, out, self.width) or not _theirs(b, out, rank):
                return False
            if bias is not None and not _theirs(bias, out):
                return False
        return _theirs(given.a, self.ranks, self.width)

    def fill(
        self,
        x: Tensor,
        narrow: Tensor,
        given: Given,
        *,
        outs: Sequence[Tensor] = (),
        slopes: Slopes | None = None,
        ahead: Sequence[Tensor] = (),
    ) -> _Stack:
        """The structure of one call: with `outs` forward, with `slopes` and the gradients of the outputs `ahead`
        backward. It points into the tensors, which have to live until the call is over."""
        to = self._stack
        to.x, to.a, to.narrow, to.rows = address(x), address(given.a), address(narrow), len(x)
        for line, weight, bias, b in zip(self._lines, given.weights, given.biases, given.bs, strict=True):
            line.weight, line.bias, line.b = address(weight), _at(bias), address(b)
        for line, out in zip(self._lines, outs, strict=False):
            line.out = address(out)
        if slopes is not None:
            to.steep, to.turned = (address(one) for one in slopes.room)
            to.dx, to.da = _at(slopes.dx), address(slopes.da)
            for line, above, db in zip(self._lines, ahead, slopes.dbs, strict=True):
                line.given, line.db = address(above), address(db)
        return to

    def outs(self, x: Tensor) -> list[Tensor]:
        """Room for the outputs."""
        return [x.new_empty(len(x), out) for out, _ in self.sizes]

    def slopes(self, x: Tensor, dx: Tensor | None) -> Slopes:
        """Room for the gradients."""
        rows, wide = len(x), torch.float32
        room = [x.new_empty(rows, self.ranks), x.new_empty(2 * self.ranks, rows + rows % 2)]
        dbs = [x.new_empty(size, dtype=wide) for size in self.sizes]
        return Slopes(dx, x.new_empty(self.ranks, self.width, dtype=wide), dbs, room)


def _run(name: str, depth: int, *structures: ctypes.Structure) -> None:
    """Call a kernel with panels of `depth` values for every thread."""
    room, each, threads = panels(depth)
    ends = (ctypes.c_void_p(address(room)), ctypes.c_long(each), ctypes.c_long(threads))
    getattr(chosen(), name)(*(ctypes.byref(one) for one in structures), *ends)


def forward(lines: Lines, x: Tensor, given: Given) -> tuple[Tensor, list[Tensor]] | None:
    """(x A^T (rows, ranks), the output (rows, out) of each line)."""
    if chosen() is None or not lines.fit(x, given):
        return None
    narrow, outs = x.new_empty(len(x), lines.ranks), lines.outs(x)
    _run("mmft_lines", lines.depth, lines.fill(x, narrow, given, outs=outs))
    return narrow, outs


def backward(
    lines: Lines, x: Tensor, narrow: Tensor, given: Given, ahead: Sequence[Tensor], *, wants_x: bool
) -> Slopes | None:
    """From the gradients `ahead` of the outputs (rows, out)."""
    if chosen() is None or not lines.fit(x, given) or not _theirs(narrow, len(x), lines.ranks):
        return None
    if not all(_theirs(one, len(x), out) for one, (out, _) in zip(ahead, lines.sizes, strict=True)):
        return None
    slopes = lines.slopes(x, torch.empty_like(x) if wants_x else None)
    depth = max(lines.depth, len(x) + 1)
    _run("mmft_lines_back", depth, lines.fill(x, narrow, given, slopes=slopes, ahead=ahead))
    return slopes


Two = tuple[Lines, Lines]


def _one_block(two: Two) -> bool:
    """Gate and up of one size, which is the width of down."""
    first, second = two
    return len(second.sizes) == 1 and [out for out, _ in first.sizes] == [second.width] * 2


def forward_gated(two: Two, x: Tensor, given: tuple[Given, Given]) -> tuple[tuple[Tensor, Tensor], list[Tensor]] | None:
    """Of gate and up, and of down: (x A^T and product A^T, [gate, up, output])."""
    first, second = two
    if chosen() is None or not _one_block(two) or not first.fit(x, given[0]):
        return None
    product = x.new_empty(len(x), second.width)
    if not second.fit(product, given[1]):
        return None
    narrow = x.new_empty(len(x), first.ranks), x.new_empty(len(x), second.ranks)
    (gate, up), (out,) = first.outs(x), second.outs(x)
    one = first.fill(x, narrow[0], given[0], outs=(gate, up))
    other = second.fill(product, narrow[1], given[1], outs=(out,))
    gates = _Gates(address(gate), address(up), 0, address(product), 0, 0, second.width)
    _run("mmft_gated", max(first.depth, second.depth), one, other, gates)
    return narrow, [gate, up, out]


def backward_gated(
    two: Two,
    x: Tensor,
    narrow: tuple[Tensor, Tensor],
    given: tuple[Given, Given],
    factors: tuple[Tensor, Tensor],
    ahead: Tensor,
    *,
    wants_x: bool,
) -> tuple[Slopes, Slopes] | None:
    """Of gate and up, and of down, from the factors gate(x) and up(x) and the gradient `ahead` of the output."""
    first, second = two
    rows = len(x)
    if chosen() is None or not _one_block(two) or not first.fit(x, given[0]):
        return None
    product = x.new_empty(rows, second.width)
    sound = second.fit(product, given[1]) and _theirs(ahead, rows, second.sizes[0][0])
    sound = sound and all(_theirs(one, *product.shape) for one in factors)
    if not sound or not all(_theirs(one, rows, lines.ranks) for one, lines in zip(narrow, two, strict=True)):
        return None
    to_gate, to_up = torch.empty_like(product), torch.empty_like(product)
    slopes = first.slopes(x, torch.empty_like(x) if wants_x else None), second.slopes(product, to_up)
    one = first.fill(x, narrow[0], given[0], slopes=slopes[0], ahead=(to_gate, to_up))
    other = second.fill(product, narrow[1], given[1], slopes=slopes[1], ahead=(ahead,))
    addresses = (address(y) for y in (*factors, to_up, product, to_gate, to_up))
    depth = max(first.depth, second.depth, rows + 1)
    _run("mmft_gated_back", depth, one, other, _Gates(*addresses, second.width))
    return slopes
