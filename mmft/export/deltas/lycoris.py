"""Hadamard and Kronecker products: LoHa (Hyeon-Woo 2022, arXiv 2108.06098) and LoKr (Yeh 2024, arXiv 2309.14859).

LoHa: `W' = W + s (A1 B1) ∘ (A2 B2)`; LoKr: `W' = W + s A ⊗ B`. Both give any rows alone. A kernel may have a core
tensor (Tucker form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmft.export.deltas.base import Adapter, Homeless, Matrix, Merge, Site, Step, is_conv, is_linear

_SHARED = {"alpha", "r", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "rank_pattern"}
LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOHA_FIELDS = frozenset({*_SHARED, "alpha_pattern"})
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOKR_FIELDS = frozenset({*LOHA_FIELDS, "decompose_both", "decompose_factor", "rank_dropout_scale"})


@dataclass(frozen=True)
class Loha:
    """Keys of both products; `cores` for a kernel in Tucker form."""

    first: tuple[str, str]
    second: tuple[str, str]
    cores: tuple[str, str] | None
    scaling: float
    kind: str = "loha"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its four or six tensors."""
        return (*self.first, *self.second, *(self.cores or ()))

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the factors."""
        a1, b1 = map(adapter.factor, self.first)
        a2, b2 = map(adapter.factor, self.second)
        cores = tuple(map(adapter.factor, self.cores)) if self.cores else None
        scale = torch.tensor(self.scaling)

        def product(a: torch.Tensor, b: torch.Tensor, core: torch.Tensor | None, rows: slice) -> torch.Tensor:
            if core is None:
                return a[rows] @ b
            return torch.einsum("i j k l, j r, i p -> p r k l", core, b, a[:, rows]).flatten(1)

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            part = slice(start, stop)
            one = product(a1, b1, cores[0] if cores else None, part)
            delta = one * product(a2, b2, cores[1] if cores else None, part) * scale
            rows += delta
            return rows, delta

        return merge


@dataclass(frozen=True)
class Lokr:
    """Keys of both Kronecker factors, whole (one key) or as a product (two, with a core tensor three)."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    scaling: float
    kind: str = "lokr"

    @property
    def keys(self) -> tuple[str, ...]:
        """All its tensors."""
        return (*self.first, *self.second)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds both Kronecker factors."""
        left, right = self.factors(adapter)

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            index = torch.arange(start, stop)
            outer, inner = left[index // right.shape[0]], right[index % right.shape[0]]  # (n, c), (n, d, …)
            shape = (stop - start, left.shape[1], *(1 for _ in right.shape[1:]))
            delta = (outer.view(shape) * inner[:, None]).reshape(stop - start, -1) * self.scaling
            rows += delta
            return rows, delta

        return merge

    def factors(self, adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, c) and (b, d) or (b, d, kh, kw), float32."""
        left = [adapter.factor(key) for key in self.first]
        right = [adapter.factor(key) for key in self.second]
        second = right[0]
        if len(right) == 2:
            second = right[0] @ right[1]
        elif len(right) == 3:
            second = torch.einsum("i j k l, i p, j r -> p r k l", right[2], right[0], right[1])
        return left[0] @ left[1] if len(left) == 2 else left[0], second


def loha_steps(site: Site) -> list[tuple[str, Step]]:
    """The step of one module."""
    _check_layer(site, "LoHa")
    first, second = _pair(site, "hada_w1"), _pair(site, "hada_w2")
    cores = (site.need("hada_t1"), site.need("hada_t2")) if "hada_t1" in site.parts else None
    shapes = [site.adapter.shape(key) for key in (*first, *second)]
    shape = site.shape()
    if cores:
        wanted = [(shapes[0][0], shape[0]), (shapes[0][0], shape[1])] * 2
        rank = shapes[0][0]
    else:
        rank = shapes[0][1]
        wanted = [(shape[0], rank), (rank, math.prod(shape[1:]))] * 2
    if shapes != wanted:
        raise Homeless
    return [(site.name(), Loha(first, second, cores, site.pattern("alpha_pattern", "alpha") / rank))]


def lokr_steps(site: Site) -> list[tuple[str, Step]]:
    """The step of one module; its rank stands in no tensor when both factors are whole, so the config's counts."""
    _check_layer(site, "LoKr")
    first = (site.need("lokr_w1"),) if "lokr_w1" in site.parts else _pair(site, "lokr_w1")
    second: tuple[str, ...] = (site.need("lokr_w2"),) if "lokr_w2" in site.parts else _pair(site, "lokr_w2")
    if "lokr_t2" in site.parts:
        second = (*second, site.need("lokr_t2"))
    rank = site.pattern("rank_pattern", "r")
    step = Lokr(first, second, site.pattern("alpha_pattern", "alpha") / rank)
    left, right = step.factors(site.adapter)
    shape = site.shape()
    flat = left.shape[1] * math.prod(right.shape[1:])
    if left.shape[0] * right.shape[0] != shape[0] or flat != math.prod(shape[1:]) or right.ndim == 3:
        raise Homeless
    return [(site.name(), step)]


def _pair(site: Site, name: str) -> tuple[str, str]:
    return site.need(f"{name}_a"), site.need(f"{name}_b")


def _check_layer(site: Site, method: str) -> None:
    if not (is_linear(site.layer) or is_conv(site.layer)):
        raise site.refuse(method, "Linear, Conv1d, Conv2d")
