"""A gated block `down(act(gate(x)) * up(x))` of three LoRA layers as one node of the graph (`lora_linear`).

Kept: x, gate(x), up(x) and the narrow products; the product of the factors is made again in backward, where its
gradient and theirs come out of one pass (by `native/lines.c` tile by tile, before they leave the cache). Price: one
more elementwise pass in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.fast import native_lines
from mmft.fast.lora_linear import Kept, Stack, backward_lines, forward_lines
from mmft.fast.native_rows import silu_times, silu_times_back


@dataclass(frozen=True)
class Act:
    """An elementwise function, and its gradient from that of its value and its argument; `silu`: kernels know it."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    silu: bool = False

    def times(self, gate: Tensor, up: Tensor, *, again: bool = False) -> tuple[Tensor, Tensor | None]:
        """`value(gate) * up`, and with `again` the first factor, where it was made."""
        made = silu_times(gate, up) if self.silu else None
        if made is not None:
            return made, None
        opened = self.value(gate)
        return (opened * up, opened) if again else (opened.mul_(up), None)

    def back(self, gate: Tensor, up: Tensor, given: Tensor, opened: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up from that of `times`, which is written over."""
        made = silu_times_back(gate, up, given) if opened is None else None
        if made is not None:
            return made
        to_up = (self.value(gate) if opened is None else opened).mul_(given)
        return self.slope(given.mul_(up), gate), to_up


ACTS = (
    Act(F.silu, lambda given, x: torch.ops.aten.silu_backward(given, x), silu=True),
    Act(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda given, x: torch.ops.aten.gelu_backward(given, x, approximate="tanh"),
    ),
    Act(F.gelu, lambda given, x: torch.ops.aten.gelu_backward(given, x)),
)
"""What gated blocks use: SiLU, GELU by tanh, GELU."""


def forward_gated(
    x: Tensor, stacks: tuple[Stack, Stack], act: Act, *, training: bool
) -> tuple[list[Tensor], Kept, Kept]:
    """gate(x), up(x) and the output for x (rows, in), and what backward needs."""
    first, second = stacks
    given = [one.native(x.dtype, training=training) for one in stacks] if act.silu else [None]
    if given[0] is not None and given[1] is not None:
        two = first.of_kernels, second.of_kernels
        whole = native_lines.forward_gated(two, x, (given[0], given[1]))
        if whole is not None:
            narrow, outs = whole
            return outs, first.kept(narrow[0], given[0]), second.kept(narrow[1], given[1])
    (gate, up), kept = forward_lines(x, first, training=training)
    (out,), other = forward_lines(act.times(gate, up)[0], second, training=training)
    return [gate, up, out], kept, other


def backward_gated(
    x: Tensor,
    stacks: tuple[Stack, Stack],
    act: Act,
    kept: tuple[Kept, Kept],
    *,
    factors: tuple[Tensor, Tensor],
    given: Tensor,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x and of both stacks' A and B, from the factors of the product and the gradient of the output."""
    again = [stack.native_again(one) for stack, one in zip(stacks, kept, strict=True)] if act.silu else [None]
    if again[0] is not None and again[1] is not None:
        two, narrow = (stacks[0].of_kernels, stacks[1].of_kernels), (kept[0].narrow, kept[1].narrow)
        both = (again[0], again[1])
        whole = native_lines.backward_gated(two, x, narrow, both, factors, given, wants_x=wants_x)
        if whole is not None:
            return whole[0].dx, stacks[0].in_order(whole[0]), stacks[1].in_order(whole[1])
    product, opened = act.times(*factors, again=True)
    to_product, second = backward_lines(product, stacks[1], kept[1], [given])
    assert to_product is not None
    slopes = act.back(*factors, to_product, opened)
    dx, first = backward_lines(x, stacks[0], kept[0], slopes, wants_x=wants_x)
    return dx, first, second


class _Gated(torch.autograd.Function):
    """A gated block as a node: `down(act(gate(x)) * up(x))`. Kept: x, gate(x), up(x); the product is made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, stacks: tuple[Stack, Stack], act: Act, training: bool, *params: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            (gate, up, out), first, second = forward_gated(rows, stacks, act, training=training)
        ctx.save_for_backward(rows, gate, up, *first.tensors(), *second.tensors())
        ctx.first, ctx.second = first.bare(), second.bare()
        ctx.stacks, ctx.act, ctx.shape, ctx.dtype = stacks, act, x.shape, x.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, gate, up, *saved = ctx.saved_tensors
        cut = 1 + 2 * len(ctx.stacks[0].lines)
        kept = ctx.first.again(saved[:cut]), ctx.second.again(saved[cut:])
        with torch.autocast(rows.device.type, enabled=False):
            given = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)
            wants_x = ctx.needs_input_grad[0]
            dx, first, second = backward_gated(
                rows, ctx.stacks, ctx.act, kept, factors=(gate, up), given=given, wants_x=wants_x
            )
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return (dx, None, None, None, None, *first, *second)


def run_gated(x: Tensor, first: Stack, second: Stack, act: Act, *, dtype: torch.dtype, training: bool) -> Tensor:
    """`down(act(gate(x)) * up(x))` of two stacks (gate and up, down), computed in `dtype`, with its own backward."""
    params = (*first.params, *second.params)
    out: Tensor = _Gated.apply(x, dtype, (first, second), act, training, *params)  # type: ignore[no-untyped-call]
    return out
