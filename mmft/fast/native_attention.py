"""Attention of a line of rows by the kernels of `native/attention.c`, as one node of the graph.

Formula: for a row with a beginning p that it also sees, `softmax(s Q [K_p; K]^T + triangle) [V_p; V]`; products in
bfloat16 summed in float32, softmax in float32, P and the slope of the scores rounded to bfloat16 for the products they
enter. Padding, gathered copies and scores in memory do not exist. Price: P is kept for backward where no row sees more
than `KEPT_KEYS` keys, and made again beyond; the kernels' room is torch's memory, refused as torch refuses it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmft.fast.attention import KEPT_KEYS
from mmft.fast.native_build import chosen, pointer

Segment = tuple[int, int, int, int]
"""Start and end of a row in the line, start and end of the beginning that it also sees (0, 0: none)."""
VECTOR = 16
TILE = 6
"""Rows of a product, and what the sums of a row's keys have room for behind its last."""


class _Strides(ctypes.Structure):
    _fields_ = [("head", ctypes.c_long), ("token", ctypes.c_long)]

    @classmethod
    def of(cls, x: Tensor) -> _Strides:
        """Those of (heads, tokens, width)."""
        return cls(x.stride(0), x.stride(1))


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("rows", "heads", "groups", "width", "out_width", "causal", "threads")),
        *((name, _Strides) for name in ("q", "k", "v", "out")),
        ("scale", ctypes.c_float),
    ]


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether kernels were chosen and take (B, H, S, D) queries of as many keys and values: bfloat16 on a CPU (or about
    to become so), widths of whole vectors."""
    if chosen() is None or not query.numel() or {one.device.type for one in (query, key, value)} != {"cpu"}:
        return False
    cast = torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu") if cast else query.dtype
    allowed = (torch.bfloat16, torch.float32, torch.float16) if cast else (torch.bfloat16,)  # autocast leaves float64
    if kind != torch.bfloat16 or any(one.dtype not in allowed for one in (query, key, value)):
        return False
    (batch, heads, tokens, width), (_, groups, _, _) = query.shape, key.shape
    rows = key.shape == (batch, groups, tokens, width) and value.shape[:3] == key.shape[:3]
    return rows and heads % groups == 0 and width % VECTOR == 0 and value.shape[3] % VECTOR == 0


def native_line(
    query: Tensor, key: Tensor, value: Tensor, table: Sequence[Segment], *, scale: float, causal: bool = True
) -> Tensor:
    """(1, H, T, D) queries, (1, KV, T, D) keys and (1, KV, T, E) values that `fits` -> (1, T, H, E). The segments cover
    the line; without `causal` a row sees all of itself."""
    q, k, v = (_plain(one[0]) for one in (query, key, value))
    out: Tensor = _Native.apply(q, k, v, tuple(table), (causal, scale))  # type: ignore[no-untyped-call]
    return out[None]


def native_rows(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool) -> Tensor:
    """(B, H, S, D) queries, keys and values of as many tokens that `fits` -> (B, H, S, E): a line of B rows."""
    batch, heads, length, _ = query.shape
    line = [one.permute(1, 0, 2, 3).flatten(1, 2)[None] for one in (query, key, value)]
    table = [(row * length, (row + 1) * length, 0, 0) for row in range(batch)]
    out = native_line(line[0], line[1], line[2], table, scale=scale, causal=causal)
    return out.view(batch, length, heads, -1).transpose(1, 2)


def _plain(x: Tensor) -> Tensor:
    """(heads, tokens, width) in bfloat16, the width's values behind one another, pairs of them aligned."""
    x = x.to(torch.bfloat16)
    whole = x.stride(2) == 1 and not (x.stride(0) | x.stride(1) | x.storage_offset()) % 2
    return x if whole else x.contiguous()


@lru_cache(maxsize=64)
def _table(segments: tuple[Segment, ...], shape: tuple[int, int, int, int]) -> tuple[Tensor, int, int]:
    """The kernel's rows; the values of P, and of the slopes of keys and values, of all of them. `shape`: tokens, heads,
    groups, widths of a key and its value together."""
    tokens, heads, groups, both = shape
    rows, at, part = [], 0, 0
    for start, end, first, last in segments:
        if not 0 <= first <= last <= start <= end <= tokens:
            raise ValueError(f"a line of {tokens} tokens has no segment {(start, end, first, last)}")
        own, keys = end - start, end - start + last - first
        rows.append((start, own, first, last - first, at, part))
        at += heads * own * (-(-keys // VECTOR) * VECTOR)
        part += groups * (keys + TILE) * both
    return torch.tensor(rows, dtype=torch.int64), at, part


def _shape(q: Tensor, k: Tensor, v: Tensor, out: Tensor, rows: int, how: tuple[bool, float]) -> _Shape:
    sizes = (rows, len(q), len(k), q.shape[2], v.shape[2], int(how[0]), torch.get_num_threads())
    return _Shape(*sizes, _Strides.of(q), _Strides.of(k), _Strides.of(v), _Strides.of(out.transpose(0, 1)), how[1])


def _room(told: Any, shape: _Shape, table: Tensor) -> tuple[Tensor, ctypes.c_long]:
    """Room for the threads of a kernel, and the bytes of each."""
    told.restype = ctypes.c_long
    each = told(ctypes.byref(shape), pointer(table))
    return torch.empty(shape.threads * each, dtype=torch.uint8), ctypes.c_long(each)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], how: tuple[bool, float]
    ) -> Tensor:
        kernels = chosen()
        assert kernels is not None
        table, values, parts = _table(segments, (q.shape[1], len(q), len(k), q.shape[2] + v.shape[2]))
        most = max(end - start + last - first for start, end, first, last in segments)
        keeps = most <= KEPT_KEYS and any(ctx.needs_input_grad)
        kept = q.new_empty(values) if keeps else None
        out = q.new_empty(q.shape[1], len(q), v.shape[2])
        shape = _shape(q, k, v, out, len(segments), how)
        room, each = _room(kernels.mmft_attend_room, shape, table)
        tensors = (table, q, k, v, out, kept, room)
        kernels.mmft_attend(ctypes.byref(shape), *(pointer(one) for one in tensors), each)
        ctx.save_for_backward(table, q, k, v, kept)
        ctx.how, ctx.parts = how, parts
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = chosen()
        assert kernels is not None
        table, q, k, v, kept = ctx.saved_tensors
        given = gradient.to(q.dtype).contiguous()
        shape = _shape(q, k, v, given, len(table), ctx.how)
        parts = torch.empty(ctx.parts)
        dq, dk, dv = (one.new_empty(one.shape[1], len(one), one.shape[2]).transpose(0, 1) for one in (q, k, v))
        room, each = _room(kernels.mmft_attend_back_room, shape, table)
        z, inputs = ctypes.byref(shape), (pointer(one) for one in (table, q, k, v, given, kept, dq))
        kernels.mmft_attend_back(z, *inputs, _Strides.of(dq), pointer(parts), pointer(room), each)
        tokens = q.shape[1]
        room = torch.empty(shape.threads, tokens, q.shape[2] + v.shape[2])
        outputs = (pointer(one) for one in (parts, room, dk, dv))
        kernels.mmft_attend_sum(z, pointer(table), ctypes.c_long(tokens), *outputs)
        return dq, dk, dv, None, None
