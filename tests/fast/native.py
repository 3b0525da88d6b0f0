"""What tests of the kernels share: the built library chosen, lines of rows, float64's answers, memory with an end."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.fast import native_build
from tests.runs import workshop

Table = Sequence[tuple[int, int, int, int]]
needs_kernels = pytest.mark.skipif(native_build.why_not() is not None, reason=str(native_build.why_not()))
LINES: dict[str, Table] = {
    "one token": [(0, 1, 0, 0)],
    "fewer than a tile": [(0, 5, 0, 0)],
    "odd lengths": [(0, 17, 0, 0), (17, 18, 0, 0), (18, 49, 0, 0)],
    "rows of vectors": [(0, 16, 0, 0), (16, 112, 0, 0)],
    "rests of a beginning": [(0, 40, 0, 0), (40, 52, 0, 40), (52, 65, 0, 40), (65, 66, 0, 40)],
    "two beginnings and a row": [
        (0, 9, 0, 0),
        (9, 140, 0, 9),
        (140, 151, 0, 0),
        (151, 160, 0, 0),
        (160, 171, 151, 160),
    ],
    "more queries than are held at once": [(0, 391, 0, 0), (391, 420, 0, 0)],
    "beyond what is kept": [(0, 530, 0, 0), (530, 947, 0, 530)],
}


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The library chosen, its files in a folder of the tests."""
    monkeypatch.setenv("MMFT_CACHE", str(workshop() / "cache"))
    library = native_build.library()
    before = native_build.choose(library)
    yield library
    native_build.choose(before)


def draw(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    """bfloat16 leaves of normal values."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).bfloat16().requires_grad_() for shape in shapes]


def a_line(
    tokens: int, *, heads: tuple[int, int] = (6, 2), widths: tuple[int, int] = (16, 16), seed: int = 0
) -> list[Tensor]:
    """Queries, keys and values (1, H, T, D) as a model's projections give them, and the slope of the output."""
    (many, few), (width, wide) = heads, widths
    shapes = [(1, tokens, many, width), (1, tokens, few, width), (1, tokens, few, wide), (1, tokens, many, wide)]
    query, key, value, slope = draw(shapes, seed)
    return [*(one.transpose(1, 2) for one in (query, key, value)), slope.detach()]


def alone(query: Tensor, key: Tensor, value: Tensor, table: Table, *, scale: float, causal: bool = True) -> Tensor:
    """(1, T, H, E): every row by torch's kernel, with its beginning before it."""
    parts = []
    for start, end, first, last in table:
        places = torch.cat((torch.arange(first, last), torch.arange(start, end)))
        seen = torch.arange(len(places))[None] <= torch.arange(last - first, len(places))[:, None]
        inputs = (query[:, :, start:end], key[:, :, places], value[:, :, places])
        mask = seen if causal else None
        parts.append(F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(parts, 2).transpose(1, 2)


def with_gradients(out: Tensor, inputs: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    """A value and the gradients of its inputs."""
    return [out.detach(), *torch.autograd.grad(out, inputs, slope.to(out.dtype))]


def doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers as float64 leaves."""
    return [one.detach().double().requires_grad_() for one in inputs]


def errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """How far a tensor is from the truth on the whole, and its worst vector, in vectors of the mean length."""
    apart = (found.detach().double() - truth).norm(dim=-1)
    mean = float(truth.norm(dim=-1).square().mean().sqrt()) or 1.0
    return float(apart.square().mean().sqrt()) / mean, float(apart.max()) / mean


def units(one: Tensor, other: Tensor) -> Tensor:
    """How many bfloat16 lie between two of them."""
    places = []
    for x in (one, other):
        bits = x.detach().contiguous().view(torch.int16).int()
        places.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (places[0] - places[1]).abs()


def every_number() -> Tensor:
    """All bfloat16 but NaN and infinities."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return x[torch.isfinite(x)]


class Guarded:
    """A library whose pointers end (or with `front` begin) at a page that nobody may touch: the process dies there."""

    def __init__(self, library: ctypes.CDLL, *, front: bool) -> None:
        self._library, self._front = library, front
        self._lent: list[tuple[Tensor, Any, int]] = []

    def pointer(self, x: Tensor | None) -> ctypes.c_void_p:
        """In the place of `native_build.pointer`."""
        if x is None:
            return ctypes.c_void_p(0)
        span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        flat = torch.as_strided(x, (span if x.numel() else 0,), (1,))
        size, page = flat.numel() * flat.element_size(), mmap.PAGESIZE
        room = mmap.mmap(-1, (-(-size // page) + 2) * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(room))
        at = page if self._front else len(room) - page - size
        ctypes.memmove(begin + at, flat.data_ptr(), size)
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (begin, begin + len(room) - page):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        self._lent.append((flat, room, begin + at))
        return ctypes.c_void_p(begin + at)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*words: Any) -> Any:
            function.restype = getattr(call, "restype", ctypes.c_int)
            told = function(*words)
            for flat, _, at in self._lent:
                ctypes.memmove(flat.data_ptr(), at, flat.numel() * flat.element_size())
            self._lent.clear()
            return told

        return call
