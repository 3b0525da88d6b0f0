"""RMS norm with its own autograd: one wide pass in each direction in the place of eight.

Formula (Zhang & Sennrich 2019): `y = w * round(x * r)`, `r = 1 / sqrt(mean(x^2) + eps)` in float32, rounded to x's type
before the weight as transformers' norms do. Backward with `g = dy * w`: `dx = r * (g - x r * r * mean(g * x))` in
float32. Kept for backward: x and r (4 bytes a row), where autograd's records of the plain formula keep x in float32
twice. Only norms with a frozen weight; price: nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmft.fast.native_rows import norm, norm_back


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        made = norm(x, weight, eps)
        if made is not None:
            ctx.save_for_backward(x, weight, made[1])
            return made[0]
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        rate = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        return torch.mul(x, rate).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rate = ctx.saved_tensors
        made = norm_back(gradient, x, weight, rate)
        if made is not None:
            return made, None, None
        given = (gradient * weight).to(rate.dtype)
        share = (given * x).sum(-1, keepdim=True).mul_(rate).mul_(rate).div_(-x.shape[-1])
        return given.addcmul_(x.to(rate.dtype), share).mul_(rate).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension; no gradient for `weight`."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def eps_of(norm: nn.Module) -> float | None:
    """The `eps` of a module that is an RMS norm by structure: one vector of weights, nothing else, a small number."""
    if (
        [name for name, _ in norm.named_parameters()] != ["weight"]
        or next(norm.children(), None)
        or next(norm.buffers(), None) is not None
    ):
        return None
    weight = norm.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1 or isinstance(norm, nn.LayerNorm):
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(eps) if isinstance(eps, float) else None


def is_rms_norm(norm: nn.Module, eps: float) -> bool:
    """Whether the module computes exactly this formula, seen on random rows in its own type."""
    weight: Any = norm.weight
    source = torch.Generator().manual_seed(0)
    x = torch.randn((4, len(weight)), generator=source).to(weight.device, weight.dtype) * 3
    with torch.no_grad():
        try:
            found = norm(x)
        except (RuntimeError, TypeError, ValueError):
            return False
        return bool(found.shape == x.shape) and bool(torch.allclose(found, rms_norm(x, weight, eps), rtol=0, atol=1e-6))
