"""Sums of products by the kernel of `native/product.c`: a frozen layer and its adapter in one pass over the output.

Formula: `out = sum_i A_i B_i^T + bias` (`across`, a layer's forward) or `sum_i A_i B_i` (its gradient), all terms in
one float32 sum that is rounded once, where torch writes, reads and rounds for each. Weights are read as they lie, a
panel at a time, and take no memory. Price: none; packing the panels is one or two of a hundred.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from mmft.fast.native_build import chosen, pointer, whole

PANEL = 64
"""Columns that are packed at once."""
Act = Literal["tanh_gelu", "erf_gelu", "quick_gelu", "relu"]
"""What may follow a sum; the kernel counts them from 1 on."""


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("lda", "ldb", "depth")),
    ]


def address(x: Tensor) -> int:
    """Of a tensor's first value."""
    return x.data_ptr()


def _plain(x: Tensor) -> bool:
    """A bfloat16 matrix on the CPU, its rows whole, in which pairs of values are aligned."""
    flat = x.dim() == 2 and x.stride(1) == 1 and not x.stride(0) % 2 and not x.storage_offset() % 2
    return flat and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0


def panels(depth: int) -> tuple[Tensor, int, int]:
    """Room for a panel of `depth` values along the sum for every thread, values of 4 bytes for each, and how many."""
    threads, each = torch.get_num_threads(), (depth + 1) // 2 * PANEL
    return torch.empty(threads * each, dtype=torch.int32), each, threads  # torch's memory: refused as torch refuses it


def product(
    terms: Sequence[tuple[Tensor, Tensor]], *, across: bool, bias: Tensor | None = None, act: Act | None = None
) -> Tensor | None:
    """Sum of `A B^T` (`across`) or `A B` over terms of (rows, depth) and (columns, depth) or (depth, columns): (rows,
    columns) bfloat16, with `act` that of these; None where the kernel was not chosen or a tensor is not its own. Raises
    ValueError for terms of unlike shapes."""
    kernels = chosen()
    if kernels is None or any(a.shape[1] % 2 or not _plain(a) or not _plain(b) for a, b in terms):
        return None
    if bias is not None and not whole(bias):
        return None
    (first, weight), count = terms[0], ctypes.c_long(len(terms))
    rows, columns = len(first), weight.shape[0 if across else 1]
    fits = bias is None or bias.shape == (columns,)
    if not fits or any(
        len(a) != rows or b.shape != ((columns, a.shape[1]) if across else (a.shape[1], columns)) for a, b in terms
    ):
        raise ValueError(f"terms of unlike shapes: {[(tuple(a.shape), tuple(b.shape)) for a, b in terms]}")
    out, (room, each, threads) = first.new_empty(rows, columns), panels(sum(a.shape[1] for a, _ in terms))
    every = (_Term * len(terms))(
        *(_Term(address(a), address(b), a.stride(0), b.stride(0), a.shape[1]) for a, b in terms)
    )
    sizes = (ctypes.c_long(one) for one in (rows, columns))
    follows = ctypes.c_long(1 + get_args(Act).index(act) if act else 0)
    ends = (pointer(room), ctypes.c_long(each), ctypes.c_long(threads))
    kernels.mmft_product(every, count, ctypes.c_long(across), pointer(bias), follows, pointer(out), *sizes, *ends)
    return out
