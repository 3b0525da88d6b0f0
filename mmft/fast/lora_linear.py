"""LoRA's own autograd: several linear layers of one input as one node of the graph.

Formula, for layers i of the same x: `y_i = x W_i^T + b_i + (x A_i^T) (s_i B_i)^T`, the A_i stacked into one product.
Backward, with `t_i = x A_i^T` and `d_i = dy_i (s_i B_i)`:
`dx = sum_i dy_i W_i + d_i A_i`, `dA_i = d_i^T x`, `dB_i = s_i dy_i^T t_i`; W_i and b_i are frozen.
Kept for backward: x once in the type that is computed in, and the narrow t; peft keeps x once for each product, in
float32 too where nothing casts. A and B are rounded to that type once per change of their float32 masters, their
gradients come back in the masters' type. Dropout p > 0 draws the masks that peft would draw, in its order, and keeps
them (1 byte a value) instead of the dropped copies. Price: nothing; the weights are read as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mmft.fast import native_lines
from mmft.fast.native_build import chosen
from mmft.fast.native_lines import Given, Slopes
from mmft.fast.native_product import product

Weight = Callable[[torch.dtype], Tensor]


class _Steps:
    """Counts the steps of all optimizers here: torch's fused ones change parameters and leave their version. After
    each what was rounded is made anew at once: made amid a forward it would lie between the activations until the next
    one, and the heap could not close up where they were (a fifth of a step's memory)."""

    taken = 0
    known: weakref.WeakSet[Rounded] = weakref.WeakSet()
    _watching = False

    @classmethod
    def watch(cls) -> None:
        """Count from now on."""
        if not cls._watching:
            register_optimizer_step_post_hook(cls._count)
            cls._watching = True

    @classmethod
    def _count(cls, *_: Any) -> None:
        cls.taken += 1
        for one in list(cls.known):
            one.again()


class Rounded:
    """Parameters (times a factor) in another type, made anew only when one of them may have changed: the step of an
    optimizer and `load_state_dict` are seen, a write through `.data` into the same memory is not (call `forget`)."""

    def __init__(self, params: Sequence[nn.Parameter], factor: float = 1.0) -> None:
        _Steps.watch()
        _Steps.known.add(self)
        self.params = tuple(params)
        self.factor = factor
        self._seen: list[Any] = []
        self._value: Tensor | None = None

    def forget(self) -> None:
        """Make it anew at the next call."""
        self._seen = []

    def again(self) -> None:
        """Make it anew now, where it was asked for before."""
        if self._value is not None and self._seen:
            self(self._value.dtype)

    def __call__(self, dtype: torch.dtype) -> Tensor:
        """The parameters stacked on dim 0, rounded to `dtype`; not part of any graph."""
        now: list[Any] = [dtype, _Steps.taken]
        for param in self.params:
            now += (param.data_ptr(), param._version)
        if self._value is None or now != self._seen:
            with torch.no_grad():
                parts = [(param * self.factor if self.factor != 1.0 else param).to(dtype) for param in self.params]
                # Never the parameter itself: an optimizer changes it in place, and backward reads this.
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                self._value = whole.detach().clone() if whole is self.params[0] else whole.detach()
            self._seen = now
        return self._value


@dataclass
class Line:
    """One linear layer with its adapter: `weight(dtype)` gives the frozen (out, in) weight. With `keeps` the weight
    that forward computed with is kept for backward (4-bit layers), else it is asked for again."""

    weight: Weight
    bias: Tensor | None
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float = 0.0
    keeps: bool = False
    b_scaled: Rounded = field(init=False)

    def __post_init__(self) -> None:
        self.b_scaled = Rounded((self.b,), self.scaling)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in another type."""
        return None if self.bias is None else self.bias.to(dtype)


class Stack:
    """Lines that read one input, with their A stacked."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = tuple(lines)
        self.a = Rounded([line.a for line in lines])
        self.ranks = [line.a.shape[0] for line in lines]
        self.params = [param for line in lines for param in (line.a, line.b)]
        sizes = [(line.b.shape[0], line.b.shape[1]) for line in lines]
        self.of_kernels = native_lines.Lines(lines[0].a.shape[1], sizes, [line.scaling for line in lines])

    def native(self, dtype: torch.dtype, *, training: bool) -> Given | None:
        """What kernels compute with; None where none are chosen, or where something is dropped."""
        if chosen() is None or dtype != torch.bfloat16 or any(training and line.dropout > 0 for line in self.lines):
            return None
        weights = [line.weight(dtype) for line in self.lines]
        biases = [line.bias_in(dtype) for line in self.lines]
        return Given(self.a(dtype), weights, biases, [line.b_scaled(dtype) for line in self.lines])

    def kept(self, narrow: Tensor, given: Given) -> Kept:
        """For backward, where nothing was dropped."""
        weights = [weight if line.keeps else None for line, weight in zip(self.lines, given.weights, strict=True)]
        return Kept(narrow, weights, [None] * len(weights), given.a, given.bs)

    def native_again(self, kept: Kept) -> Given | None:
        """As `native`, from what was kept."""
        dtype = kept.narrow.dtype
        if chosen() is None or dtype != torch.bfloat16 or any(mask is not None for mask in kept.masks):
            return None
        both = zip(self.lines, kept.weights, strict=True)
        weights = [line.weight(dtype) if weight is None else weight for line, weight in both]
        return Given(kept.a, weights, [None] * len(weights), kept.b)

    def in_order(self, slopes: Slopes) -> list[Tensor | None]:
        """Gradients in the order of `params`, in their types."""
        parts = zip(self.lines, slopes.da.split(self.ranks), slopes.dbs, strict=True)
        return [one for line, da, db in parts for one in (da.to(line.a.dtype), db.to(line.b.dtype))]

    def forget(self) -> None:
        """See `Rounded.forget`."""
        self.a.forget()
        for line in self.lines:
            line.b_scaled.forget()


@dataclass
class Kept:
    """What forward leaves for backward beside x: x A^T, weights of lines that keep theirs, dropout masks (`tensors`, to
    be saved by autograd, so that checkpointing can drop them), and the rounded A and B, which exist anyway."""

    narrow: Tensor
    weights: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]
    a: Tensor
    b: Sequence[Tensor]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd has to save."""
        return (self.narrow, *self.weights, *self.masks)

    def again(self, saved: Sequence[Tensor | None]) -> Kept:
        """The same from what autograd saved."""
        narrow, lines = saved[0], (len(saved) - 1) // 2
        assert narrow is not None
        return Kept(narrow, saved[1 : 1 + lines], saved[1 + lines :], self.a, self.b)

    def bare(self) -> Kept:
        """Without the tensors that autograd saves."""
        return Kept(self.narrow.new_empty(0), (), (), self.a, self.b)


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype).mul_(1.0 / (1.0 - p))


def forward_lines(x: Tensor, stack: Stack, *, training: bool) -> tuple[list[Tensor], Kept]:
    """Outputs of all lines for x (rows, in), and what backward needs."""
    given = stack.native(x.dtype, training=training)
    whole = None if given is None else native_lines.forward(stack.of_kernels, x, given)
    if given is not None and whole is not None:
        return whole[1], stack.kept(whole[0], given)
    a, outs, weights = stack.a(x.dtype), [], []
    masks: list[Tensor | None] = []
    drops = [training and line.dropout > 0 for line in stack.lines]
    if any(drops):
        parts, at = [], 0
        for line, rank, drop in zip(stack.lines, stack.ranks, drops, strict=True):
            mask = torch.empty_like(x).bernoulli_(1.0 - line.dropout).bool() if drop else None
            parts.append(F.linear(_dropped(x, mask, line.dropout), a[at : at + rank]))
            masks.append(mask)
            at += rank
        narrow = torch.cat(parts, 1)
    else:
        made = product([(x, a)], across=True)
        narrow = F.linear(x, a) if made is None else made
        masks = [None] * len(stack.lines)
    b = [line.b_scaled(x.dtype) for line in stack.lines]
    for line, part, wide in zip(stack.lines, narrow.split(stack.ranks, 1), b, strict=True):
        weight = line.weight(x.dtype)
        bias = line.bias_in(x.dtype)
        out = product([(x, weight), (part, wide)], across=True, bias=bias)
        outs.append(F.linear(x, weight, bias).addmm_(part, wide.t()) if out is None else out)
        weights.append(weight if line.keeps else None)
    return outs, Kept(narrow, weights, masks, a, b)


def _summed(terms: Sequence[tuple[Tensor, Tensor]], narrow: tuple[Tensor, Tensor] | None) -> Tensor:
    """The sum of products of gradients and weights, with that of the adapters' narrow side."""
    made = product([*terms, narrow] if narrow is not None else terms, across=False)
    if made is not None:
        return made
    dx = torch.mm(*terms[0])
    for given, weight in terms[1:]:
        dx.addmm_(given, weight)
    return dx if narrow is None else dx.addmm_(*narrow)


def _by_kernels(
    x: Tensor, stack: Stack, kept: Kept, gradients: Sequence[Tensor | None], *, wants_x: bool
) -> Slopes | None:
    ahead = [one for one in gradients if one is not None]
    given = stack.native_again(kept) if len(ahead) == len(gradients) else None
    if given is None:
        return None
    return native_lines.backward(stack.of_kernels, x, kept.narrow, given, ahead, wants_x=wants_x)


def backward_lines(
    x: Tensor, stack: Stack, kept: Kept, gradients: Sequence[Tensor | None], *, wants_x: bool = True
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of every A and B, in the order of `stack.params`, from those of the outputs (rows, out)."""
    whole = _by_kernels(x, stack, kept, gradients, wants_x=wants_x)
    if whole is not None:
        return whole.dx, stack.in_order(whole)
    steep = torch.zeros_like(kept.narrow) if any(g is None for g in gradients) else torch.empty_like(kept.narrow)
    slopes, narrows = steep.split(stack.ranks, 1), kept.narrow.split(stack.ranks, 1)
    terms: list[tuple[Tensor, Tensor]] = []
    for number, (line, given) in enumerate(zip(stack.lines, gradients, strict=True)):
        if given is None:
            continue
        torch.mm(given, kept.b[number], out=slopes[number])
        if wants_x:
            weight = kept.weights[number]
            terms.append((given, line.weight(x.dtype) if weight is None else weight))
    found: list[Tensor | None] = []
    dropping = any(mask is not None for mask in kept.masks)
    stacked = None if dropping else torch.mm(steep.t(), x)
    dx = _summed(terms, None if dropping else (steep, kept.a)) if terms else None
    at = 0
    for number, (line, given) in enumerate(zip(stack.lines, gradients, strict=True)):
        rank, mask = stack.ranks[number], kept.masks[number]
        if given is None:
            found += [None, None]
        else:
            if stacked is None:
                da = torch.mm(slopes[number].t(), _dropped(x, mask, line.dropout))
                if dx is not None:
                    dx += _dropped(torch.mm(slopes[number], kept.a[at : at + rank]), mask, line.dropout)
            else:
                da = stacked[at : at + rank]
            db = torch.mm(given.t(), narrows[number]).to(line.b.dtype).mul_(line.scaling)
            found += [da.to(line.a.dtype), db]
        at += rank
    return dx, found


class _Lines(torch.autograd.Function):
    """`Stack` as a node: x (..., in) -> an output (..., out) for each line."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, stack: Stack, training: bool, *params: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            outs, kept = forward_lines(rows, stack, training=training)
        ctx.save_for_backward(rows, *kept.tensors())
        ctx.kept = kept.bare()
        ctx.stack, ctx.shape, ctx.dtype = stack, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        rows, *saved = ctx.saved_tensors
        kept = ctx.kept.again(saved)
        with torch.autocast(rows.device.type, enabled=False):
            given = [None if g is None else g.reshape(-1, g.shape[-1]).to(rows.dtype) for g in gradients]
            dx, found = backward_lines(rows, ctx.stack, kept, given, wants_x=ctx.needs_input_grad[0])
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.dtype)
        return (dx, None, None, None, *found)


def run_lines(x: Tensor, stack: Stack, *, dtype: torch.dtype, training: bool) -> tuple[Tensor, ...]:
    """The outputs of all lines for x, computed in `dtype`, with their own backward."""
    outs: tuple[Tensor, ...] = _Lines.apply(x, dtype, stack, training, *stack.params)  # type: ignore[no-untyped-call]
    return outs
