"""Cross-entropy of a linear head with its gradient made in the forward pass: two products, nothing computed again.

Formula, for rows h with target t: `z = cap(scale * (h W^T + b + s (h A^T) B^T))` with `cap(x) = c tanh(x / c)` where
the model caps, and `-(1 - e) log softmax(z)[t] - e / V sum log softmax(z)` with label smoothing e. Products in the
type of the forward, softmax in float32. The gradients of h (and of W, b, A, B where they are trained) are known as
soon as the logits are, so the logits are dropped chunk by chunk: `CHUNK_BYTES` in all, where autograd keeps 10 bytes
for each row and token of the vocabulary. Price: none in products; in evaluation no gradient is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.fast import native_loss

CHUNK_BYTES = 96 << 20
"""Logits, their softmax and their gradient that exist at once."""
LEAST_ROWS = 16


@dataclass(frozen=True)
class LinearHead:
    """A vocabulary head and what its model does to the logits. `a`, `b`: LoRA's, with `scaling`."""

    weight: Tensor
    bias: Tensor | None = None
    a: nn.Parameter | None = None
    b: nn.Parameter | None = None
    scaling: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    @property
    def bare(self) -> bool:
        """A weight and nothing else."""
        return self.bias is None and self.a is None and self.scale == 1.0 and self.cap is None

    def raw(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The linear layer's outputs, `weight` being its own in the type of `hidden`."""
        out = F.linear(hidden, weight, None if self.bias is None else self.bias.to(hidden.dtype))
        if self.a is not None and self.b is not None:
            out = out + F.linear(F.linear(hidden, self.a.to(hidden.dtype)), self.b.to(hidden.dtype) * self.scaling)
        return out

    def shaped(self, raw: Tensor) -> Tensor:
        """Logits in float32 (float64 stays): scaled, then capped."""
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        wide = wide if self.scale == 1.0 else wide * self.scale
        return wide if self.cap is None else torch.tanh(wide / self.cap) * self.cap


def linear_cross_entropy(
    hidden: Tensor, targets: Tensor, head: LinearHead, *, smoothing: float = 0.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the loss over the rows of `hidden` (n, h), greedy hits, each row's loss (n,) without a graph); products
    are made in `dtype`."""
    dtype = dtype or hidden.dtype
    trained = (head.weight, head.bias, head.a, head.b)
    found: tuple[Tensor, Tensor, Tensor] = _LinearLoss.apply(hidden, targets, head, smoothing, dtype, *trained)  # type: ignore[no-untyped-call]
    return found


class _Sums:
    """Gradients of the head's own parameters, added up over chunks in float32."""

    def __init__(self, head: LinearHead, wanted: tuple[bool, ...]) -> None:
        self.head = head
        self.found: list[Tensor | None] = [None] * 4
        self.wanted = wanted

    def _add(self, place: int, value: Tensor) -> None:
        if self.wanted[place]:
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            before = self.found[place]
            self.found[place] = wide if before is None else before.add_(wide)

    def add(self, hidden: Tensor, slope: Tensor, into: Tensor) -> None:
        """One chunk: `slope` is that of the linear layer's outputs, `into` the gradient of `hidden` so far."""
        head = self.head
        if self.wanted[0]:
            self._add(0, slope.t() @ hidden)
        if self.wanted[1]:
            self._add(1, slope.to(torch.promote_types(slope.dtype, torch.float32)).sum(0))
        if head.a is not None and head.b is not None:
            a, b = head.a.to(hidden.dtype), head.b.to(hidden.dtype) * head.scaling
            narrow = slope @ b
            into.addmm_(narrow, a)
            if self.wanted[2]:
                self._add(2, narrow.t() @ hidden)
            if self.wanted[3]:
                self._add(3, (slope.t() @ F.linear(hidden, a)) * head.scaling)


class _Scratch:
    """Memory for the logits of a chunk, kept from step to step: fresh pages cost a CPU more than the arithmetic."""

    _held: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def take(cls, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content; it is overwritten at the next call with this name."""
        size, held = shape[0] * shape[1], cls._held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            held = cls._held[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


def _logp(part: Tensor, weight: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """(logits, their log-softmax) of a chunk; both are overwritten by the next."""
    shape = (len(part), len(weight))
    wide = torch.promote_types(part.dtype, torch.float32)
    out = _Scratch.take("logp", shape, wide, part.device)
    if head.bare:
        raw = torch.mm(part, weight.t(), out=_Scratch.take("raw", shape, part.dtype, part.device))
        shaped = _Scratch.take("shaped", shape, wide, part.device).copy_(raw)
    else:
        shaped = head.shaped(head.raw(part, weight))
    return shaped, torch.ops.aten._log_softmax.out(shaped, -1, False, out=out)


def _hits(shaped: Tensor, goals: Tensor) -> Tensor:
    """How many rows' first largest logit is the goal's; only rows that tie with it are looked through."""
    best = shaped.gather(1, goals[:, None])[:, 0] == shaped.amax(-1)
    return (shaped[best].argmax(-1) == goals[best]).sum()


def _terms(logp: Tensor, goals: Tensor, smoothing: float) -> Tensor:
    """Each row's loss."""
    terms = (smoothing - 1.0) * logp.gather(1, goals[:, None])[:, 0]
    return terms - smoothing * logp.mean(-1) if smoothing else terms


def _to_logits(
    shaped: Tensor, logp: Tensor, goals: Tensor, head: LinearHead, smoothing: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of the linear layer's outputs in `dtype`; `logp` and `shaped` are written over."""
    slope = logp.exp_()
    slope.scatter_add_(1, goals[:, None], torch.full_like(slope[:, :1], smoothing - 1.0))
    if smoothing:
        slope -= smoothing / slope.shape[1]
    if head.cap is not None:
        slope *= 1.0 - (shaped / head.cap).square_()
    if head.scale != 1.0:
        slope *= head.scale
    return _Scratch.take("raw", (len(slope), slope.shape[1]), dtype, slope.device).copy_(slope)


def _native_part(part: Tensor, goals: Tensor, weight: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's loss and how many are hits, by the kernel; `into` takes the gradient of `part`."""
    room = _Scratch.take("raw", (len(part), len(weight)), part.dtype, part.device)
    terms, hits = native_loss.head_loss(part, weight, goals, room, into)
    return terms, hits.sum()


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: LinearHead,
        smoothing: float,
        dtype: torch.dtype,
        *trained: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad
        sums = _Sums(head, wanted[5:])
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.weight.detach().to(dtype)
            rows, slope = hidden.to(dtype), torch.empty_like(hidden, dtype=dtype)
            total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
            hits, each = targets.new_zeros(()), []
            native = not smoothing and head.bare and not any(wanted[5:]) and native_loss.fits(rows, weight)
            step = max(LEAST_ROWS, CHUNK_BYTES // ((4 if native else 10) * len(weight)))
            for part, goals, into in zip(rows.split(step), targets.split(step), slope.split(step), strict=True):
                if native:
                    terms, right = _native_part(part, goals, weight, into if wanted[0] else None)
                else:
                    shaped, logp = _logp(part, weight, head)
                    terms, right = _terms(logp, goals, smoothing), _hits(shaped, goals)
                    if any(wanted):
                        given = _to_logits(shaped, logp, goals, head, smoothing, dtype)
                        torch.mm(given, weight, out=into)
                        sums.add(part, given, into)
                total, hits = total + terms.sum(), hits + right
                each.append(terms)
        terms = torch.cat(each)
        ctx.mark_non_differentiable(hits, terms)
        ctx.save_for_backward(slope if wanted[0] else None, *sums.found)
        ctx.types = [None if one is None else one.dtype for one in (hidden, *trained)]
        return total, hits, terms

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Any, ...]:
        found = [
            None if one is None else (one * gradient).to(kind)
            for one, kind in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return (found[0], None, None, None, None, *found[1:])
