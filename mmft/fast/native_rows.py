"""RMS norm and the gated product by the kernels of `native/rows.c`: one pass over memory each, in both directions.

They round where transformers' norms and torch's `silu` round, in bfloat16 only; where kernels are not chosen or a
tensor is not theirs, the functions return None and the caller goes on with torch.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mmft.fast.native_build import chosen, pointer, whole


def _library(*tensors: Tensor) -> ctypes.CDLL | None:
    return chosen() if whole(*tensors) else None


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """`weight * x / rms(x)` over the last dimension, and 1 / rms(x) of every row in float32 (..., 1)."""
    kernels = _library(x, weight)
    if kernels is None or weight.shape != x.shape[-1:]:
        return None
    out, rate = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    count, width = ctypes.c_long(rate.numel()), ctypes.c_long(x.shape[-1])
    tensors = (x, weight, out, rate)
    kernels.mmft_norm(*(pointer(one) for one in tensors), count, width, ctypes.c_float(eps), _threads())
    return out, rate


def norm_back(given: Tensor, x: Tensor, weight: Tensor, rate: Tensor) -> Tensor | None:
    """The gradient of x from that of the norm's value."""
    kernels = _library(given, x, weight)
    if kernels is None or given.shape != x.shape:
        return None
    out = torch.empty_like(x)
    count, width = ctypes.c_long(rate.numel()), ctypes.c_long(x.shape[-1])
    tensors = (given, x, weight, rate, out)
    kernels.mmft_norm_back(*(pointer(one) for one in tensors), count, width, _threads())
    return out


def silu_times(gate: Tensor, up: Tensor) -> Tensor | None:
    """`silu(gate) * up`."""
    kernels = _library(gate, up)
    if kernels is None or gate.shape != up.shape:
        return None
    out = torch.empty_like(up)
    tensors = (gate, up, out)
    kernels.mmft_gate(*(pointer(one) for one in tensors), ctypes.c_long(up.numel()), _threads())
    return out


def silu_times_back(gate: Tensor, up: Tensor, given: Tensor) -> tuple[Tensor, Tensor] | None:
    """The gradients of gate and up; that of up takes the place of `given`."""
    kernels = _library(gate, up, given)
    if kernels is None or not gate.shape == up.shape == given.shape:
        return None
    to_gate = torch.empty_like(gate)
    tensors = (gate, up, given, to_gate, given)
    kernels.mmft_gate_back(*(pointer(one) for one in tensors), ctypes.c_long(up.numel()), _threads())
    return to_gate, given
