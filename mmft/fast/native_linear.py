"""Frozen linear layers by the product kernel: in towers, in projectors, and where no adapter sits.

Backward needs the weight alone: `dx = dy W`. Layers that train, that torch would compute in another type, and few rows
(a panel is packed for all rows at once: generation goes one token at a time) stay with torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmft.fast.native_product import product
from mmft.fast.swap import swapped

LEAST_ROWS = 32
"""Fewer rows are torch's: the packing would not be paid back."""


CAST = (torch.bfloat16, torch.float32, torch.float16)
"""What autocast computes in bfloat16."""


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        made = product([(rows, weight)], across=True, bias=bias)
        return torch.nn.functional.linear(rows, weight, bias) if made is None else made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        made = product([(gradient.contiguous(), weight)], across=False)
        return torch.mm(gradient, weight) if made is None else made, None, None


def is_frozen(module: Any) -> bool:
    """Whether it is a linear layer of torch's own, in bfloat16, that does not train."""
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain and not any(one.requires_grad or one.dtype != torch.bfloat16 for one in module.parameters())


def rows_of(layer: Any, x: Tensor) -> Tensor | None:
    """x as rows in bfloat16, where the kernel takes them for this layer; None where they are torch's."""
    cast = torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu") if cast else x.dtype
    few = x.numel() < LEAST_ROWS * x.shape[-1]
    if kind != torch.bfloat16 or few or layer.weight.requires_grad or x.dtype not in CAST:
        return None
    return x.to(kind).reshape(-1, x.shape[-1])


class _FastLinear:
    """Mixed in before `nn.Linear`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self: Any, x: Tensor) -> Tensor:
        rows, made = rows_of(self, x), None
        if rows is not None and torch.is_grad_enabled() and rows.requires_grad:
            with torch.autocast("cpu", enabled=False):
                made = _Frozen.apply(rows, self.weight, self.bias)  # type: ignore[no-untyped-call]
        elif rows is not None:
            made = product([(rows, self.weight)], across=True, bias=self.bias)
        out: Tensor = super().forward(x) if made is None else made.view(*x.shape[:-1], made.shape[-1])  # type: ignore[misc]
        return out


def put_in(model: Any) -> Iterator[Any]:
    """Make the model's frozen linear layers in bfloat16 fast; those that were, which `take_back` takes. The head has a
    loss of its own, and a layer below an adapter is its adapter's."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if is_frozen(module) and module is not head and not name.endswith(".base_layer"):
            module.__class__ = swapped(_FastLinear, nn.Linear)
            yield module


def take_back(layers: list[Any]) -> None:
    """Make them torch's again."""
    for layer in layers:
        layer.__class__ = nn.Linear
