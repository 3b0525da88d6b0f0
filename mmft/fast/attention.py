"""Attention by batched matrix products: the same sums as `scaled_dot_product_attention`, in fewer seconds on a CPU.

Formula: `softmax(scale * Q K^T + mask) V`, scores and softmax in float32, P and the products with it in the type of V.
Queries that share a key head are one matrix (grouped queries are never repeated), and a causal mask is cut into blocks
of queries that see only the keys up to their end. Price: P (heads * queries * keys) is kept for backward up to
`KEPT_KEYS` keys and computed again beyond. torch's own CPU kernel tiles P instead, which pays on long rows and where
the matrix units are fast enough that the tiles' overhead does not show.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Queries of a causal block."""
KEPT_KEYS = 512
"""Rows up to this length keep P for backward: 2 * heads * keys bytes a token."""


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of (B, H, S, D) queries over (B, KV, T, D) keys and (B, KV, T, E) values -> (B, H, S, E).

    `mask` (broadcast to (B, 1 or H, S, T)) is boolean, true where a key is seen, or added to the scores; with `causal`
    query i sees keys up to i (S = T). A query that sees no key gets the mean of the values it was given.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # as torch's kernel would
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask is not None and mask.dtype == torch.bool:
        low = torch.zeros((), dtype=torch.float32, device=mask.device)
        mask = low.masked_fill(~mask, torch.finfo(torch.float32).min / 2)
    out: Tensor = _Attention.apply(query, key, value, mask, (causal, scale))  # type: ignore[no-untyped-call]
    return out


class _Choice:
    products = False


def choose_products(on: bool) -> bool:
    """Whether `attend` makes products; what it was before."""
    before, _Choice.products = _Choice.products, on
    return before


def products_chosen() -> bool:
    """What `choose_products` chose."""
    return _Choice.products


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`grouped_attention` where products were chosen and are meant for the call, else torch's kernel. Not for dropout
    on P, one query, and rows of many keys that are all seen."""
    long = key.shape[2] > KEPT_KEYS and not causal
    if _Choice.products and not (dropout or long or query.shape[2] == 1 or query.device.type != "cpu"):
        return grouped_attention(query, key, value, mask=mask, causal=causal, scale=scale)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _blocks(queries: int, keys: int, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, behind the last, keys that are seen)."""
    if not causal or queries <= BLOCK:
        return [(0, queries, keys)]
    return [(at, min(at + BLOCK, queries), min(at + BLOCK, keys)) for at in range(0, queries, BLOCK)]


def _probabilities(
    rows: Tensor, keys: Tensor, mask: Tensor | None, block: tuple[int, int, int], causal: bool
) -> Tensor:
    """P of one block, (B * KV, G * b, t) float32 (float64 where the inputs are); `rows` are scaled queries."""
    begin, end, seen = block
    scores = torch.bmm(rows, keys[:, :seen].transpose(1, 2))
    if mask is not None:
        heads = scores.view(mask.shape[0] if mask.shape[0] > 1 else 1, -1, end - begin, seen)
        heads += mask[:, :, begin:end, :seen]
    if causal:
        width = end - begin
        diagonal = torch.full((width, width), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
        scores.view(-1, width, seen)[:, :, begin:seen] += diagonal
    return torch.softmax(scores, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: tuple[bool, float]
    ) -> Tensor:
        causal, scale = kind
        batch, heads, length, width = query.shape
        groups, seen = key.shape[1], key.shape[2]
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        rows = query.reshape(batch * groups, heads // groups, length, width)
        keys, values = key.reshape(-1, seen, width), value.reshape(-1, seen, value.shape[-1])
        wide = keys.to(exact)
        blocks, kept, parts = _blocks(length, seen, causal), [], []
        keep = seen <= KEPT_KEYS
        for block in blocks:
            part = rows[:, :, block[0] : block[1]].reshape(batch * groups, -1, width)
            with torch.autocast(query.device.type, enabled=False):
                p = _probabilities(part.to(exact) * scale, wide, mask, block, causal).to(value.dtype)
                parts.append(torch.bmm(p, values[:, : block[2]]).view(len(rows), rows.shape[1], -1, value.shape[-1]))
            if keep:
                kept.append(p)
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        ctx.save_for_backward(rows, keys, values, mask, *kept)
        ctx.blocks, ctx.causal, ctx.scale, ctx.shape = blocks, causal, scale, (query.shape, key.shape, value.shape)
        return out.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, mask, *kept = ctx.saved_tensors
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        several = len(ctx.blocks) > 1
        given = gradient.to(values.dtype).reshape(*rows.shape[:3], -1)
        keys_gradient = torch.zeros_like(keys, dtype=exact) if several else None
        values_gradient = torch.zeros_like(values, dtype=exact) if several else None
        parts = []
        with torch.autocast(rows.device.type, enabled=False):
            wide = None if kept else keys.to(exact)
            for number, block in enumerate(ctx.blocks):
                begin, end, seen = block
                part = rows[:, :, begin:end].reshape(len(rows), -1, rows.shape[-1])
                out = given[:, :, begin:end].reshape(len(rows), -1, given.shape[-1])
                if wide is None:
                    p = kept[number]
                else:
                    p = _probabilities(part.to(exact) * ctx.scale, wide, mask, block, ctx.causal).to(values.dtype)
                slope = torch.bmm(out, values[:, :seen].transpose(1, 2))
                slope = torch.ops.aten._softmax_backward_data(slope, p, -1, p.dtype)
                parts.append((torch.bmm(slope, keys[:, :seen]) * ctx.scale).view(*rows.shape[:2], end - begin, -1))
                to_keys = torch.bmm(slope.transpose(1, 2), part)
                to_values = torch.bmm(p.transpose(1, 2), out)
                if keys_gradient is None or values_gradient is None:
                    keys_gradient, values_gradient = to_keys, to_values
                else:
                    keys_gradient[:, :seen] += to_keys
                    values_gradient[:, :seen] += to_values
        assert keys_gradient is not None and values_gradient is not None
        query_shape, key_shape, value_shape = ctx.shape
        rows_gradient = (torch.cat(parts, 2) if several else parts[0]).view(query_shape)
        to_key = (keys_gradient * ctx.scale).to(keys.dtype).view(key_shape)
        return rows_gradient, to_key, values_gradient.to(values.dtype).view(value_shape), None, None
