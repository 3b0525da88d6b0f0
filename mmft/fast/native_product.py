"""Sums of products by the kernel of `native/product.c`: a frozen layer and its adapter in one pass over the output.

Formula: `out = sum_i A_i B_i^T + bias` (`across`, a layer's forward) or `sum_i A_i B_i` (its gradient), all terms in
one float32 sum that is rounded once, where torch writes, reads and rounds for each. Weights are read as they lie: packed
a panel at a time in the processor's cache, they take no memory. Price: none; the packing is one or two of a hundred.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mmft.fast.native_build import chosen, pointer


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        *((name, ctypes.c_int64) for name in ("lda", "ldb", "depth")),
    ]


def _plain(x: Tensor) -> bool:
    """A bfloat16 matrix on the CPU, its rows whole, in which pairs of values are aligned."""
    flat = x.dim() == 2 and x.stride(1) == 1 and not x.stride(0) % 2 and not x.storage_offset() % 2
    return flat and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0


def product(terms: Sequence[tuple[Tensor, Tensor]], *, across: bool, bias: Tensor | None = None) -> Tensor | None:
    """Sum of `A B^T` (`across`) or `A B` over terms of (rows, depth) and (columns, depth) or (depth, columns): (rows,
    columns) bfloat16; None where the kernel was not chosen or a tensor is not its own."""
    kernels = chosen()
    if kernels is None or any(a.shape[1] % 2 or not _plain(a) or not _plain(b) for a, b in terms):
        return None
    if bias is not None and (bias.dtype != torch.bfloat16 or not bias.is_contiguous()):
        return None
    (first, weight), count = terms[0], ctypes.c_int64(len(terms))
    rows, columns = len(first), weight.shape[0 if across else 1]
    out = first.new_empty(rows, columns)
    every = (_Term * len(terms))(
        *(_Term(a.data_ptr(), b.data_ptr(), a.stride(0), b.stride(0), a.shape[1]) for a, b in terms)
    )
    sizes = (ctypes.c_int64(one) for one in (columns, rows, columns, torch.get_num_threads()))
    kernels.mmft_product(every, count, ctypes.c_int64(across), pointer(bias), pointer(out), *sizes)
    return out
