"""Each method's formula in float64, written apart from `deltas/`, with the deviation that float32 sums explain.

A block is given as its exact values and what they may already be off by. A float32 sum of k products is off by at most
about k 2^-24 of the sum of the products' sizes (Higham 2002, 3.1), so every formula is evaluated twice: as it is, and
with all its factors made positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import singledispatch

import torch

from mmft.export.deltas.base import Adapter, Step
from mmft.export.deltas.ia3 import Scale
from mmft.export.deltas.lora import Ada, Experts, Lora, Vera
from mmft.export.deltas.lycoris import Loha, Lokr
from mmft.export.deltas.plain import BiasAdd, Replace, Tokens
from mmft.export.deltas.rotation import Boft, Oft, butterfly, skew_of

U = 2.0**-24
Exact = tuple[torch.Tensor, torch.Tensor]  # values and what they may be off by, float64 (n, width)
Apply = Callable[[Exact, int, int, float], Exact]  # block, start, stop, unit roundoff of the stored type
Source = Callable[[], Iterator[tuple[torch.Tensor, int, int]]]  # the weight's blocks before the step


@singledispatch
def reference(step: Step, adapter: Adapter, source: Source) -> Apply:
    """How the step changes a block of exact values. Raises NotImplementedError for a step without a formula here."""
    raise NotImplementedError(type(step).__name__)


def _read(adapter: Adapter, key: str) -> torch.Tensor:
    return adapter.weights.read(key).double()


def _add(block: Exact, delta: torch.Tensor, size: torch.Tensor, *, terms: float, early: float = 0.0) -> Exact:
    """A sum: float32 products of `terms` terms, one float32 addition, and `early` roundings of the delta."""
    value, slack = block
    return value + delta, slack + terms * U * size + U * (value.abs() + delta.abs()) + early * delta.abs()


@reference.register
def _(step: Replace, adapter: Adapter, source: Source) -> Apply:
    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        whole = adapter.weights.read(step.key) if not adapter.shape(step.key) else None
        fresh = whole if whole is not None else adapter.weights.read(step.key, start, stop)
        value = fresh.double().reshape(block[0].shape)
        return value, torch.zeros_like(value)

    return apply


@reference.register
def _(step: Tokens, adapter: Adapter, source: Source) -> Apply:
    rows = _read(adapter, step.key)

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        value = block[0].clone()
        for row, index in zip(rows, step.indices, strict=True):
            if start <= index < stop:
                value[index - start] = row
        return value, block[1]

    return apply


@reference.register
def _(step: BiasAdd, adapter: Adapter, source: Source) -> Apply:
    bias = _read(adapter, step.key).view(-1, 1) * step.scaling

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        return _add(block, bias[start:stop], bias[start:stop].abs(), terms=2)

    return apply


@reference.register
def _(step: Scale, adapter: Adapter, source: Source) -> Apply:
    scale = _read(adapter, step.key).reshape(-1).repeat_interleave(step.repeat)

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        by = scale[start:stop, None] if step.axis == 0 else scale[None]
        value = block[0] * by
        return value, block[1] * by.abs() + U * value.abs()

    return apply


@reference.register
def _(step: Lora, adapter: Adapter, source: Source) -> Apply:
    a, b = _read(adapter, step.a), _read(adapter, step.b)
    turned = step.layer in ("embedding", "conv1d")
    left, right = (a.T, b.T) if turned else (b.flatten(1), a.flatten(1))
    s = step.scaling

    def delta(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = left[start:stop]
        return part @ right * s, part.abs() @ right.abs() * abs(s)

    def plain(block: Exact, start: int, stop: int, unit: float) -> Exact:
        return _add(block, *delta(start, stop), terms=a.shape[0] + 4, early=unit if step.early else 0.0)

    if step.magnitude is None:
        return plain
    magnitude = _read(adapter, step.magnitude).reshape(-1)
    columns = None
    if turned:
        columns = sum((value.double() + delta(i, j)[0]).square().sum(0) for value, i, j in source()).sqrt()  # type: ignore[union-attr]
    length = step.shape[0] if turned else math.prod(step.shape[1:])

    def dora(block: Exact, start: int, stop: int, unit: float) -> Exact:
        # the delta is never rounded to the stored type here, so `early` is 0
        total, slack = _add(block, *delta(start, stop), terms=a.shape[0] + 4)
        if columns is None:
            norm = total.norm(dim=1, keepdim=True)
            noise = slack.norm(dim=1, keepdim=True) / norm + length**0.5 * 4 * U
            factor = magnitude[start:stop, None] / norm
        else:
            noise = slack.max() / columns * length**0.5 + length**0.5 * 4 * U
            factor = magnitude / columns
        return factor * total, factor.abs() * (slack + total.abs() * noise)

    return dora


@reference.register
def _(step: Experts, adapter: Adapter, source: Source) -> Apply:
    experts, height, _ = step.shape
    a, b = _read(adapter, step.a), _read(adapter, step.b)
    rank = a.shape[0] // experts

    def of(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = a[expert * rank : (expert + 1) * rank], b[:, expert::experts]
        pair = (other @ one * step.scaling, other.abs() @ one.abs() * abs(step.scaling))
        return (pair[0].T, pair[1].T) if step.transposed else pair

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        rows = torch.arange(start, stop)
        delta, size = torch.zeros_like(block[0]), torch.zeros_like(block[0])
        for expert in range(start // height, (stop - 1) // height + 1):
            mine = rows // height == expert
            value, large = of(expert)
            delta[mine], size[mine] = value[rows[mine] % height], large[rows[mine] % height]
        return _add(block, delta, size, terms=rank + 4, early=unit)

    return apply


@reference.register
def _(step: Ada, adapter: Adapter, source: Source) -> Apply:
    a, b, e = (_read(adapter, key) for key in (step.a, step.b, step.e))
    s = step.scaling / (step.ranknum + 1e-5)

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        left, right = ((a * e).T[start:stop], b.T) if step.transposed else (b[start:stop], a * e)
        return _add(block, left @ right * s, left.abs() @ right.abs() * abs(s), terms=a.shape[0] + 8)

    return apply


@reference.register
def _(step: Vera, adapter: Adapter, source: Source) -> Apply:
    lambda_b, lambda_d = _read(adapter, step.lambda_b), _read(adapter, step.lambda_d)
    shared = step.projections(adapter, len(lambda_d))

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        value = block[0]
        kind = {2.0**-8: torch.bfloat16, 2.0**-11: torch.float16}.get(unit) if not step.shared else None
        a, b = ((half.to(kind) if kind else half).double() for half in shared)
        left = lambda_b[:, None] * b[: len(lambda_b)]
        if step.transposed:
            left, right = (lambda_d[:, None] * a).T[start:stop], left.T
        else:
            left, right = left[start:stop], lambda_d[:, None] * a[:, : value.shape[1]]
        return _add(block, left @ right, left.abs() @ right.abs(), terms=len(lambda_d) + 6)

    return apply


@reference.register
def _(step: Loha, adapter: Adapter, source: Source) -> Apply:
    a1, b1, a2, b2 = (_read(adapter, key) for key in (*step.first, *step.second))
    cores = [_read(adapter, key) for key in step.cores] if step.cores else None
    rank = b1.shape[0]

    def product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, part: slice) -> torch.Tensor:
        if core is None:
            return a[part] @ b
        return torch.tensordot(a[:, part].T, torch.einsum("ijkl,jr->irkl", core, b), dims=1).flatten(1)

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        part, none = slice(start, stop), (None, None)
        one, two = cores or none
        delta = product(a1, b1, one, part) * product(a2, b2, two, part) * step.scaling
        ones, twos = [core.abs() for core in cores] if cores else none
        size = product(a1.abs(), b1.abs(), ones, part) * product(a2.abs(), b2.abs(), twos, part) * abs(step.scaling)
        return _add(block, delta, size, terms=(2 * rank + 6) * (rank if cores else 1))

    return apply


@reference.register
def _(step: Lokr, adapter: Adapter, source: Source) -> Apply:
    def half(keys: tuple[str, ...], *, positive: bool) -> torch.Tensor:
        parts = [_read(adapter, key).abs() if positive else _read(adapter, key) for key in keys]
        if len(parts) == 3:
            return torch.einsum("ijkl,ip,jr->prkl", parts[2], parts[0], parts[1])
        return parts[0] @ parts[1] if len(parts) == 2 else parts[0]

    pairs = [(half(step.first, positive=p), half(step.second, positive=p)) for p in (False, True)]
    height = pairs[0][1].shape[0]

    def rows(left: torch.Tensor, right: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        first, last = start // height, (stop - 1) // height + 1
        kernel = left[first:last].view(last - first, -1, *(1 for _ in right.shape[2:]))
        return torch.kron(kernel, right).flatten(1)[start - first * height : stop - first * height] * step.scaling

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        size = rows(*pairs[1], start, stop).abs()
        return _add(block, rows(*pairs[0], start, stop), size, terms=adapter.shape(step.first[-1])[0] + 100)

    return apply


@reference.register
def _(step: Oft, adapter: Adapter, source: Source) -> Apply:
    skew = skew_of(_read(adapter, step.key), step.block)
    if step.eps is not None:
        limit = step.eps / skew.shape[0] ** 0.5
        skew = skew * (limit / skew.flatten(1).norm(dim=1).clamp(min=limit)).view(-1, 1, 1)
    one = torch.eye(step.block, dtype=torch.float64)
    turn = one + 0 * skew
    if step.terms:
        last = max(step.terms - 1, 3) if step.terms > 2 else step.terms - 1
        for power in range(1, last + 1):
            turn = turn + (1 if power == last > 1 else 2) * torch.matrix_power(skew, power)
    else:
        turn = (one - skew) @ torch.linalg.inv(one + skew)
    size = torch.linalg.matrix_exp(2 * skew.abs())  # bounds every term of both series

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        blocks = turn if step.left else turn.mT
        value = _blockwise(block[0], blocks)
        noise = _blockwise(block[0].abs(), size.mT if not step.left else size) * (4 * step.block + 40) * U
        return value, _blockwise(block[1], blocks.abs()) + noise

    return apply


@reference.register
def _(step: Boft, adapter: Adapter, source: Source) -> Apply:
    raw = _read(adapter, step.key)
    scale = _read(adapter, step.scale).reshape(-1, 1)
    skew = (raw - raw.mT) / 2
    one = torch.eye(step.block, dtype=torch.float64)
    turns = (one - skew) @ torch.linalg.inv(one + skew)

    def apply(block: Exact, start: int, stop: int, unit: float) -> Exact:
        value, slack = block
        size = value.abs()
        for level in range(step.factors):
            order = butterfly(value.shape[1], step.block, level, step.factors)
            place = torch.zeros_like(order).scatter_(0, order, torch.arange(len(order)))
            value = _blockwise(value[:, place], turns[level].mT)[:, order]
            slack = _blockwise(slack[:, place], turns[level].mT.abs())[:, order]
            size = _blockwise(size[:, place], (one + turns[level].abs()).mT)[:, order]
        by = scale[start:stop]
        noise = size * (8 * step.block + 40) * step.factors * U
        return value * by, (slack + noise) * by.abs()

    return apply


def _blockwise(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Rows times a block-diagonal matrix, without building it."""
    size = blocks.shape[-1]
    parts = rows.reshape(len(rows), -1, size)
    return torch.einsum("nbi,bij->nbj", parts, blocks.expand(parts.shape[1], size, size)).flatten(1)
