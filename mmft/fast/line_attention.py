"""Attention of a line of rows by batched matrix products, forward and backward as one node of the graph.

Rows of nearly one length (and rests of one beginning) become one batch, padded at their ends; a causal row never sees
the padding behind it, so that no mask is needed but the triangle. Formula, for a row with a beginning p before it:
`softmax(s Q [K_p; K]^T + triangle) [V_p; V]`, scores and softmax in float32 as in `attention`, P and the products with
it in the type of V. Price: the padding (`SLACK` of a row at most) and P, kept for backward up to `KEPT_KEYS` keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmft.fast.attention import KEPT_KEYS

BLOCK = 128
"""Queries of a block, which sees only the keys up to its end."""
SLACK = 0.15
"""Share of a row that may be padding."""
ROUND = 16
"""Keys of a row are a multiple of this: vectors of 16 floats, a third of the softmax's time."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Rows (start, end) that are computed together, `length` tokens each with their padding; all see `before`."""

    spans: tuple[Span, ...]
    before: Span

    @property
    def length(self) -> int:
        """Tokens of the longest row; of rows without a beginning rounded up, for the softmax over their keys."""
        longest = max(end - start for start, end in self.spans)
        return longest if self.seen else longest + -longest % ROUND

    @property
    def seen(self) -> int:
        """Tokens of the beginning."""
        return self.before[1] - self.before[0]

    def blocks(self) -> list[Span]:
        """Stretches of queries."""
        return [(at, min(at + BLOCK, self.length)) for at in range(0, self.length, BLOCK)]


@lru_cache(maxsize=64)
def groups_of(table: tuple[tuple[int, int, int, int], ...]) -> tuple[Group, ...]:
    """The segments of a line (start, end, start of before, end of before), sorted into groups of nearly one length."""
    by_before: dict[Span, list[Span]] = {}
    for start, end, first, last in table:
        by_before.setdefault((first, last) if last else (0, 0), []).append((start, end))
    found = []
    for before, spans in by_before.items():
        spans.sort(key=lambda span: span[0] - span[1])
        group: list[Span] = []
        for span in spans:
            if group and span[1] - span[0] < (1 - SLACK) * (group[0][1] - group[0][0]):
                found.append(Group(tuple(group), before))
                group = []
            group.append(span)
        found.append(Group(tuple(group), before))
    return tuple(found)


def line_attention(query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], *, scale: float) -> Tensor:
    """(1, H, T, D) queries, (1, KV, T, D) keys and (1, KV, T, E) values -> (1, T, H, E); the groups cover the line."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:  # as torch's kernel would
        query, key, value = (one.to(torch.get_autocast_dtype(kind)) for one in (query, key, value))
    out: Tensor = _Line.apply(query, key, value, tuple(groups), scale)  # type: ignore[no-untyped-call]
    return out


def _rows(x: Tensor, group: Group, *, beginning: bool = False) -> Tensor:
    """(N, T, D) of the line -> (rows, N, length, D), zeros behind a row's end; with `beginning` that comes first."""
    before = group.seen if beginning else 0
    out = x.new_empty(len(group.spans), x.shape[0], before + group.length, x.shape[2])
    for row, (start, end) in enumerate(group.spans):
        if before:
            out[row, :, :before] = x[:, group.before[0] : group.before[1]]
        out[row, :, before : before + end - start] = x[:, start:end]
        if end - start < group.length:
            out[row, :, before + end - start :] = 0
    return out


@lru_cache(maxsize=16)
def _triangle(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((width, width), float("-inf"), dtype=dtype, device=device).triu_(1)


@dataclass
class _Call:
    """One group's tensors: queries (b, G, L, D), keys and values (b, p + L, D), with b = rows * KV."""

    group: Group
    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, group: Group, query: Tensor, key: Tensor, value: Tensor) -> _Call:
        shared = query.shape[0] // key.shape[0]
        queries = _rows(query, group)
        queries = queries.view(len(group.spans) * key.shape[0], shared, group.length, -1)
        keys, values = (_rows(one, group, beginning=True).flatten(0, 1) for one in (key, value))
        return cls(group, queries, keys, values)

    def part(self, x: Tensor, block: Span) -> Tensor:
        """Queries of a block, or what has their shape: (b, G * w, D)."""
        return x[:, :, block[0] : block[1]].reshape(len(x), -1, x.shape[-1])

    def probabilities(self, block: Span, wide: Tensor) -> Tensor:
        """P of a block, (b, G * w, keys up to its end) in the type of V; `wide` are scaled keys in float32."""
        width, seen = block[1] - block[0], self.group.seen + block[1]
        scores = torch.bmm(self.part(self.queries, block).to(wide.dtype), wide[:, :seen].transpose(1, 2))
        scores.view(-1, width, seen)[:, :, seen - width :] += _triangle(width, wide.dtype, wide.device)
        return torch.softmax(scores, -1).to(self.values.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Line(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
        _, heads, tokens, _ = query.shape
        out = value.new_empty(1, tokens, heads, value.shape[-1])
        saved: list[Tensor] = []
        with torch.autocast(query.device.type, enabled=False):
            for group in groups:
                call = _Call.of(group, query[0], key[0], value[0])
                wide = call.keys.to(_exact(key.dtype)) * scale
                saved += [call.queries, call.keys, call.values]
                for block in group.blocks():
                    p = call.probabilities(block, wide)
                    made = torch.bmm(p, call.values[:, : group.seen + block[1]])
                    _put(out[0], made, group, block)
                    if _kept(group):
                        saved.append(p)
        ctx.save_for_backward(*saved)
        ctx.groups, ctx.scale, ctx.shapes = groups, scale, (query.shape, key.shape, value.shape)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # read once: a recomputed layer gives them out once
        saved, (query, key, value) = iter(tensors), ctx.shapes
        kind = tensors[0].dtype
        to_query = gradient.new_empty((query[2], query[1], query[3]), dtype=kind)
        to_key, to_value = (gradient.new_zeros(shape[1:], dtype=_exact(kind)) for shape in (key, value))
        given = gradient[0].to(kind).transpose(0, 1)
        with torch.autocast(gradient.device.type, enabled=False):
            for group in ctx.groups:
                call = _Call(group, next(saved), next(saved), next(saved))
                kept = [next(saved) for _ in group.blocks()] if _kept(group) else None
                _back(call, kept, given, (to_query, to_key, to_value), ctx.scale)
        to_query = to_query.mul_(ctx.scale).transpose(0, 1)[None]
        return to_query, to_key.mul_(ctx.scale).to(kind)[None], to_value.to(kind)[None], None, None


def _kept(group: Group) -> bool:
    return group.seen + group.length <= KEPT_KEYS


def _put(out: Tensor, made: Tensor, group: Group, block: Span) -> None:
    """(b, G * w, E) of a block into the line (T, H, E), without the padding."""
    width = block[1] - block[0]
    rows = made.view(len(group.spans), -1, width, made.shape[-1])
    for row, (start, end) in enumerate(group.spans):
        real = min(width, end - start - block[0])
        if real > 0:
            at = start + block[0]
            out[at : at + real] = rows[row, :, :real].transpose(0, 1)


def _back(
    call: _Call, kept: list[Tensor] | None, given: Tensor, into: tuple[Tensor, Tensor, Tensor], scale: float
) -> None:
    """One group's gradients: of queries put into (T, H, D), of keys and values added to (KV, T, D)."""
    group, to_query = call.group, into[0]
    slopes = _rows(given, group).view(*call.queries.shape[:3], -1)
    wide = None if kept is not None else call.keys.to(_exact(call.keys.dtype)) * scale
    to_keys: Tensor | None = None
    to_values: Tensor | None = None
    blocks = group.blocks()
    for number in reversed(range(len(blocks))):  # the last block sees every key
        block = blocks[number]
        seen = group.seen + block[1]
        if kept is not None:
            p = kept[number]
        else:
            assert wide is not None
            p = call.probabilities(block, wide)
        out = call.part(slopes, block)
        slope = torch.bmm(out, call.values[:, :seen].transpose(1, 2))
        slope = torch.ops.aten._softmax_backward_data(slope, p, -1, p.dtype)
        _put(to_query, torch.bmm(slope, call.keys[:, :seen]), group, block)
        keys = torch.bmm(slope.transpose(1, 2), call.part(call.queries, block))
        values = torch.bmm(p.transpose(1, 2), out)
        if to_keys is None or to_values is None:
            to_keys, to_values = (one if len(blocks) == 1 else one.to(into[1].dtype) for one in (keys, values))
        else:
            to_keys[:, :seen] += keys
            to_values[:, :seen] += values
    assert to_keys is not None and to_values is not None
    for total, made in ((into[1], to_keys), (into[2], to_values)):
        rows = made.view(len(group.spans), total.shape[0], -1, made.shape[-1])
        if group.seen:
            total[:, group.before[0] : group.before[1]] += rows[:, :, : group.seen].sum(0, dtype=total.dtype)
        for row, (start, end) in enumerate(group.spans):
            total[:, start:end] += rows[row, :, group.seen : group.seen + end - start]
