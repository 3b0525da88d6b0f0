"""LoRA and its kin: `W' = W + s B A` with fixed, learned or pruned factors, in peft's own order of operations.

LoRA: Hu et al. 2021 (arXiv 2106.09685), `s = alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023);
DoRA: Liu et al. 2024 (2402.09353); AdaLoRA: Zhang et al. 2023 (2303.10512), `s B diag(E) A`; VeRA: Kopiczko et al. 2023
(2310.11454), `diag(b) B diag(d) A` with shared random A and B. All factors are float32, as peft loads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mmft.export.deltas.base import Adapter, Homeless, Matrix, Merge, Step, Sum

Kind = Literal["linear", "conv1d", "conv", "embedding"]


@dataclass(frozen=True)
class Lora:
    """Keys of A and B of one module; `shape` is the weight's own."""

    layer: Kind
    a: str  # (r, in), embedding (r, rows), convolution (r, in, …)
    b: str  # (out, r), convolution (out, r, 1, …)
    scaling: float
    shape: tuple[int, ...]
    magnitude: str | None = None  # DoRA's
    early: bool = False  # delta rounded to the weight's type before it is added: embeddings and bare parameters
    kind: str = "lora"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its two or three tensors."""
        return (self.a, self.b, *((self.magnitude,) if self.magnitude else ()))

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the factors; DoRA on a table or a Conv1D also one norm per column, from a first pass over the rows."""
        a, b = adapter.factor(self.a), adapter.factor(self.b)
        if self.magnitude is not None:
            return self._dora(adapter, weight, a, b)

        # peft adds a linear delta in float32 and rounds once, an embedding's after rounding it to the weight's type
        if not self.early:
            return Sum(lambda start, stop: self.delta(a, b, start, stop))

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            delta = self.delta(a, b, start, stop)
            rows += delta.to(rows.dtype)
            return rows, delta

        return merge

    def delta(self, a: torch.Tensor, b: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of `s B A`, float32."""
        if self.layer == "linear":
            return (b[start:stop] @ a).mul_(self.scaling)
        if self.layer in ("embedding", "conv1d"):
            return (b @ a[:, start:stop]).T * self.scaling
        if len(self.shape) == 4 and self.shape[2:] == (1, 1):
            return (b[start:stop, :, 0, 0] @ a[:, :, 0, 0]) * self.scaling
        convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[len(self.shape)]
        return (convolve(a.transpose(0, 1), b[start:stop]).transpose(0, 1) * self.scaling).flatten(1)

    def _dora(self, adapter: Adapter, weight: Matrix, a: torch.Tensor, b: torch.Tensor) -> Merge:
        assert self.magnitude is not None
        magnitude = adapter.factor(self.magnitude).reshape(-1)
        by_column = self.layer in ("embedding", "conv1d")
        norms = self._column_norms(weight, a, b) if by_column else None

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            total = rows + self.delta(a, b, start, stop)
            if norms is not None:
                factor = (magnitude / norms).view(1, -1)
            else:
                factor = (magnitude[start:stop] / _row_norm(total, self.shape)).view(-1, 1)
            merged = (factor * total).to(rows.dtype)
            return merged, merged.float() - rows.float()

        return merge

    def _column_norms(self, weight: Matrix, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        blocks = list(weight.blocks())
        if len(blocks) == 1:
            total = weight.read(*blocks[0]) + self.delta(a, b, *blocks[0])
            return torch.linalg.norm(total.T, dim=1)
        squares = torch.zeros(weight.width, dtype=torch.float64)
        for start, stop in blocks:
            total = weight.read(start, stop) + self.delta(a, b, start, stop)
            squares += total.double().square().sum(0)
        return squares.sqrt().float()


def _row_norm(total: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 2:
        return torch.linalg.norm(total, dim=1)
    return total.view(-1, *shape[1:]).norm(p=2, dim=tuple(range(1, len(shape))))


@dataclass(frozen=True)
class Experts:
    """LoRA on a bare parameter `(E, a, b)`: all experts' factors in one pair, A (r·E, in) and B (out, r·E)."""

    a: str
    b: str
    scaling: float
    shape: tuple[int, ...]
    transposed: bool  # the parameter is (E, in, out)
    kind: str = "lora"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its two tensors."""
        return (self.a, self.b)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the factors of all experts."""
        experts, height = self.shape[0], self.shape[1]
        a = adapter.factor(self.a).view(experts, -1, adapter.shape(self.a)[1])  # (E, r, in)
        b = adapter.factor(self.b).view(adapter.shape(self.b)[0], -1, experts)  # (out, r, E)

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            parts = []
            at = start
            while at < stop:
                expert, first = divmod(at, height)
                last = min(height, first + stop - at)
                parts.append(self._slice(a, b, expert, slice(first, last)))
                at += last - first
            delta = parts[0] if len(parts) == 1 else torch.cat(parts)
            rows += delta.to(rows.dtype)  # peft rounds the delta to the parameter's type first
            return rows, delta

        return merge

    def _slice(self, a: torch.Tensor, b: torch.Tensor, expert: int, part: slice) -> torch.Tensor:
        one, other = a[expert : expert + 1], b[:, :, expert : expert + 1]
        if self.transposed:
            return torch.einsum("o r e, e r i -> e i o", other, one[:, :, part])[0] * self.scaling
        return torch.einsum("o r e, e r i -> e o i", other[part], one)[0] * self.scaling


@dataclass(frozen=True)
class Ada:
    """AdaLoRA: `s / (n + 1e-5) B (E ∘ A)` with n the rank it began with."""

    a: str
    b: str
    e: str
    scaling: float
    ranknum: float
    transposed: bool
    kind: str = "adalora"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its three tensors."""
        return (self.a, self.b, self.e)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the factors."""
        a, b, e = (adapter.factor(key) for key in (self.a, self.b, self.e))
        scaled = a * e
        rank = torch.tensor([self.ranknum]) + 1e-5

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            product = (b @ scaled[:, start:stop]).T if self.transposed else b[start:stop] @ scaled
            delta = product * self.scaling / rank
            rows += delta
            return rows, delta

        return merge


@dataclass(frozen=True)
class Vera:
    """VeRA; `shared` are the keys of A and B, None when both are drawn again from `seed`."""

    lambda_b: str
    lambda_d: str
    shared: tuple[str, str] | None
    seed: int
    largest: tuple[int, int]  # (outputs, inputs) of the largest adapted module
    transposed: bool
    kind: str = "vera"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own two tensors and the shared ones."""
        return (self.lambda_b, self.lambda_d, *(self.shared or ()))

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds this module's part of A and B."""
        b, d = adapter.factor(self.lambda_b), adapter.factor(self.lambda_d)
        a_all, b_all = self.projections(adapter, len(d))
        outputs = b.shape[0]
        inputs = weight.rows if self.transposed else weight.width
        drawn_in = torch.float32

        left, right = b[:, None] * b_all[:outputs], d[:, None] * a_all[:, :inputs]

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal left, right, drawn_in
            if not self.shared and drawn_in != rows.dtype:  # peft rounds what it draws to the type of the base
                left, right = b[:, None] * b_all[:outputs].to(rows.dtype), d[:, None] * a_all[:, :inputs].to(rows.dtype)
                drawn_in = rows.dtype
            delta = (left @ right[:, start:stop]).T if self.transposed else left[start:stop] @ right
            rows += delta
            return rows, delta

        return merge

    def projections(self, adapter: Adapter, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, inputs) and B (outputs, r), float32."""
        if self.shared:
            return adapter.factor(self.shared[0]), adapter.factor(self.shared[1])
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        outputs, inputs = self.largest

        def draw(shape: tuple[int, int]) -> torch.Tensor:
            # Kaiming uniform of gain sqrt(2): the bound is sqrt(3) sqrt(2 / fan in)
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        return draw((rank, inputs)), draw((outputs, rank))


def delta_shape(layer: Kind, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the product. Raises Homeless when the factors do not fit each other."""
    if layer == "conv":
        if len(a) == len(b) and len(a) >= 3 and b[1:] == (a[0], *(1 for _ in a[2:])):
            return (b[0], *a[1:])
        raise Homeless
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise Homeless
    return (b[0], a[1]) if layer == "linear" else (a[1], b[0])


__all__ = ["Ada", "Experts", "Kind", "Lora", "Step", "Vera", "delta_shape"]
