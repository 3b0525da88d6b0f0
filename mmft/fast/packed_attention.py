"""Attention over a line of rows (`data.packing.pack`): every row sees itself, and a shared beginning where it has one.

One function, entered through transformers' `AttentionInterface`; the table of segments travels in the place of the 4-D
attention mask, which transformers hands through to every layer as it is. A call without such a table is the model's
ordinary `sdpa` call, so evaluation and generation go on as before.

    row i:        softmax(s Q_i K_i^T + causal) V_i
    rest i of p:  softmax(s Q_i [K_p; K_i]^T + [all of p | causal]) [V_p; V_i]

No mask over the whole line exists: the price is sum n_i^2 / 2 instead of (sum n_i)^2, and one small mask (rests x
(beginning + rests)) per shared beginning. Queries that share a key head are not repeated. A sliding window w lets
token t see t - w + 1 .. t, counted in the row. On CUDA a line without shared beginnings goes through flash-attention's
variable-length kernel where it is installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available

from mmft.errors import BackboneError
from mmft.fast.attention import attend, choose_products, products_chosen
from mmft.fast.line_attention import groups_of, line_attention
from mmft.fast.native_attention import fits, native_line
from mmft.fast.native_build import choose

NAME = "mmft_packed"
Row = tuple[int, int, int, int]
"""(start, end, start of before, end of before) of a segment."""


def register() -> None:
    """Make the name known to transformers; again does no harm."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass
class Seen:
    """Calls with a table, and the windows they came with."""

    calls: int = 0
    windows: set[int | None] = field(default_factory=set)


_watching: list[Seen] = []


@contextmanager
def watched() -> Iterator[Seen]:
    """Count the calls with a table while open."""
    seen = Seen()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


@contextmanager
def as_torch() -> Iterator[None]:
    """Compute by torch's operators while open: a proof about a line of rows is not to meet other last bits as well."""
    products, kernels = choose_products(False), choose(None)
    try:
        yield
    finally:
        choose_products(products)
        choose(kernels)


def is_table(mask: Any) -> bool:
    """Whether an attention mask is a table of segments."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[-1] == 4


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """(B, H, T, D) queries, (B, KV, T, D) keys and values -> (B, T, H, D). Raises BackboneError for what a row alone
    would get and a line does not: biases, soft caps, sinks, a cache."""
    if not is_table(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    assert attention_mask is not None
    extra = [name for name in ("softcap", "s_aux", "position_bias") if keywords.get(name) is not None]
    if extra or query.shape[2] != key.shape[2]:
        raise BackboneError(
            f"attention with {', '.join(extra) or 'a cache'} cannot be packed", where=type(module).__name__
        )
    window = keywords.get("sliding_window")
    for seen in _watching:
        seen.calls += 1
        seen.windows.add(window)
    rows: list[Row] = [tuple(row) for row in attention_mask[0, 0].tolist()]  # type: ignore[misc]
    if query.is_cuda and not any(row[3] for row in rows) and is_flash_attn_2_available():
        return _flash(query, key, value, rows, dropout=dropout, scale=scaling, window=window), None
    longest = max(row[1] - row[0] + row[3] - row[2] for row in rows)
    whole = query.device.type == "cpu" and not dropout and (window is None or window >= longest)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if whole and scale > 0 and fits(query, key, value):
        return native_line(query, key, value, rows, scale=scale), None
    if whole and products_chosen():
        return line_attention(query, key, value, groups_of(tuple(rows)), scale=scale), None
    parts = [
        _attend(query, key, value, list(group), dropout=dropout, scale=scaling, window=window)
        for _, group in groupby(rows, key=lambda row: row[2:] if row[3] else row)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Row],
    *,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """One segment, or all rests of one beginning."""
    start, end, first, last = rows[0][0], rows[-1][1], *rows[0][2:]
    q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
    mask = None
    if last:
        k, v = torch.cat((key[:, :, first:last], k), 2), torch.cat((value[:, :, first:last], v), 2)
        mask = _mask(tuple(row[1] - row[0] for row in rows), last - first, window, query.device)
    elif window is not None and end - start > window:
        mask = _mask((end - start,), 0, window, query.device)
    return attend(q, k, v, mask=mask, causal=mask is None, scale=scale, dropout=dropout)


@lru_cache(maxsize=64)
def _mask(lengths: tuple[int, ...], before: int, window: int | None, device: torch.device) -> Tensor:
    """(1, 1, rests, before + rests) bool: a token sees all before, and its own rest up to itself, within the window."""
    rest = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    place = torch.cat([torch.arange(length) for length in lengths]) + before
    rests, places = torch.cat((torch.full((before,), -1), rest)), torch.cat((torch.arange(before), place))
    seen = ((rests == -1) | (rests == rest[:, None])) & (places <= place[:, None])
    if window is not None:
        seen &= place[:, None] - places < window
    return seen[None, None].to(device)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Sequence[Row],
    *,
    dropout: float,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """The variable-length kernel of flash-attention."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    edges = torch.tensor([0, *(row[1] for row in rows)], dtype=torch.int32, device=query.device)
    longest = max(row[1] - row[0] for row in rows)
    return _flash_attention_forward(  # type: ignore[no-any-return]
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        query_length=query.shape[2],
        is_causal=True,
        dropout=dropout,
        softmax_scale=scale,
        sliding_window=window,
        cu_seq_lens_q=edges,  # type: ignore[arg-type]
        cu_seq_lens_k=edges,  # type: ignore[arg-type]
        max_length_q=longest,
        max_length_k=longest,
        implementation="flash_attention_2",
    )
