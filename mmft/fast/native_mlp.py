"""Frozen blocks `second(act(first(x)))` of linear layers: the act as part of the first layer's product.

A block is seen by its structure (two frozen linear layers, an act, nothing else) and then by number: its act is one of
`ACTS` bit for bit, its forward on random rows is the formula. The kernel rounds where torch does, before the act and
behind it. Where a gradient flows the block's own forward runs: the act's slope needs what the kernel does not keep.
Price: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.fast.native_linear import is_frozen, rows_of
from mmft.fast.native_product import Act, product
from mmft.fast.swap import swapped

ACTS: dict[Act, Callable[[Tensor], Tensor]] = {
    "tanh_gelu": lambda x: F.gelu(x, approximate="tanh"),
    "erf_gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
"""What the kernel's acts are."""
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a module answers that takes something else than rows."""


class _FastMlp:
    """Mixed in before a block's class."""

    mmft_mlp: tuple[str, str, Act]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        first, second, act = self.mmft_mlp
        made = None if kwargs or len(args) != 1 else _acted(getattr(self, first), args[0], act)
        out: Tensor = super().forward(*args, **kwargs) if made is None else getattr(self, second)(made)  # type: ignore[misc]
        return out


def _acted(layer: Any, x: Tensor, act: Act) -> Tensor | None:
    """`act(layer(x))`; None where a gradient flows, or where the layer is torch's to compute."""
    rows = None if torch.is_grad_enabled() and x.requires_grad else rows_of(layer, x)
    made = None if rows is None else product([(rows, layer.weight)], across=True, bias=layer.bias, act=act)
    return None if made is None else made.view(*x.shape[:-1], made.shape[-1])


def put_in(model: Any) -> Iterator[tuple[Any, type]]:
    """Make the model's blocks fast; each, and the class it had, which `take_back` takes."""
    for block in model.modules():
        found = _parts(block)
        if found is not None:
            kind, block.mmft_mlp = type(block), found
            block.__class__ = swapped(_FastMlp, kind)
            yield block, kind


def take_back(blocks: list[tuple[Any, type]]) -> None:
    """Make them what they were."""
    for block, kind in blocks:
        block.__class__ = kind
        del block.mmft_mlp


def _parts(block: Any) -> tuple[str, str, Act] | None:
    """Names of a block's layers, in the order in which it applies them, and its act; None for another module."""
    children = dict(block.named_children())
    layers = [name for name, one in children.items() if is_frozen(one)]
    acts = [one for name, one in children.items() if name not in layers]
    if len(layers) != 2 or len(acts) != 1 or any(_is_watched(one) for one in (block, *children.values())):
        return None
    act = _act_of(acts[0])
    first, second = (children[name] for name in layers)
    if act is None or first.out_features != second.in_features or not _is_formula(block, first, second, ACTS[act]):
        return None
    return layers[0], layers[1], act


def _is_watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _act_of(module: nn.Module) -> Act | None:
    """The kernel's act whose values these are, bit for bit."""
    x = torch.linspace(-8, 8, 2049).bfloat16()
    try:
        made = None if list(module.parameters()) else module(x.clone())
    except REFUSALS:
        return None
    return next(
        (name for name, value in ACTS.items() if isinstance(made, Tensor) and torch.equal(made, value(x))), None
    )


def _is_formula(block: Any, first: Any, second: Any, act: Callable[[Tensor], Tensor]) -> bool:
    """One forward on random rows, as it trains and as it does not."""
    source, was = torch.Generator().manual_seed(0), block.training
    x = torch.randn((3, first.in_features), generator=source).to(first.weight)
    try:
        with torch.no_grad():
            wanted = second(act(first(x)))
            made = [block.train(mode)(x) for mode in (True, False)]
    except REFUSALS:
        return False
    finally:
        block.train(was)
    return all(isinstance(one, Tensor) and torch.equal(one, wanted) for one in made)
