"""How the LoRA factors of one module are combined: pure functions of tensors, in peft's order of operations.

Yadav et al. 2023 (TIES, arXiv 2306.01708), Yu et al. 2023 (DARE, arXiv 2311.03099). Names and meaning are those of
peft's `add_weighted_adapter`. With `d_i = s_i B_i A_i` and weights `w_i`:

- `cat`: the exact `sum w_i d_i`, of rank `sum r_i`.
- `svd`: the best approximation of the same sum at a chosen rank.
- `linear`: `A = sum sgn(w_i) sqrt|w_i s_i| A_i`, `B = sum sqrt|w_i s_i| B_i`: cheap, and not the sum, because
  `B A` has cross terms. `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` treat A and B apart in the same way.
- `*_svd`: the same treatment of the products `d_i`, then the best approximation at a chosen rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

METHODS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
PRUNING = tuple(name for name in METHODS if name.startswith(("ties", "dare", "magnitude")))
"""Methods that keep a share of the values, and need a density."""
RANKED = tuple(name for name in METHODS if name.endswith("svd"))
"""Methods that take a rank."""


@dataclass(frozen=True)
class Factors:
    """The factors of one adapter on one module: `a` (r, ...), `b` (out, r, ...), float32; delta = scaling * b a."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: float


@dataclass(frozen=True)
class Mixed:
    """Factors with scaling one. TIES: of `kept_twice` values that two or more adapters keep, `conflicts` differ in
    sign."""

    a: torch.Tensor
    b: torch.Tensor
    conflicts: int = 0
    kept_twice: int = 0


def mix(
    given: Sequence[Factors], method: str, *, density: float | None, rank: int, generator: torch.Generator
) -> Mixed:
    """The combination of one module's factors (at least one; those of adapters without this module are left out).

    `rank` is the largest rank of a `*svd` result, `density` the share of values that pruning keeps. DARE draws from
    `generator`: first for all A, then for all B, or for the products. Price of `*_svd` with pruning: the full matrix
    of every adapter and one SVD of it; `svd` alone works on the factors.
    """
    if method == "cat":
        return Mixed(
            torch.cat([item.a * item.weight * item.scaling for item in given], 0),
            torch.cat([item.b for item in given], 1),
        )
    if method == "svd":
        return _svd_of_sum(given, rank)
    if method in RANKED:
        products = [product(item) for item in given]
        weights = torch.tensor([item.weight for item in given])
        total, conflicts, twice = _arithmetic(
            products, weights, method.removesuffix("_svd"), density=density, generator=generator
        )
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        return _shaped(given[0], v[:rank], u[:, :rank] * s[:rank], conflicts=conflicts, kept_twice=twice)
    scaled = [item.weight * item.scaling for item in given]
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = [root if value >= 0 else -root for root, value in zip(roots, scaled, strict=True)]
    a, conflicts_a, twice_a = _arithmetic(
        [item.a for item in given], torch.tensor(signed), method, density=density, generator=generator
    )
    b, conflicts_b, twice_b = _arithmetic(
        [item.b for item in given], torch.tensor(roots), method, density=density, generator=generator
    )
    return Mixed(a, b, conflicts_a + conflicts_b, twice_a + twice_b)


def product(item: Factors) -> torch.Tensor:
    """`scaling * b a` as a matrix (out, in * kernel)."""
    return (item.b.flatten(1) @ item.a.flatten(1)) * item.scaling


def inner(left: Factors, right: Factors) -> float:
    """`<d_left, d_right>` of two products without making either, in float64; the weights are left out."""
    a = left.a.flatten(1).double() @ right.a.flatten(1).double().T
    b = left.b.flatten(1).double().T @ right.b.flatten(1).double()
    return float((a * b).sum()) * left.scaling * right.scaling


def _arithmetic(
    tensors: list[torch.Tensor],
    weights: torch.Tensor,
    method: str,
    *,
    density: float | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, int, int]:
    """The combined tensor, sign conflicts, and values kept by two or more."""
    if method in ("ties", "magnitude_prune"):
        tensors = [_largest(tensor, density or 0.0) for tensor in tensors]
    elif method in ("dare_linear", "dare_ties"):
        tensors = [_random(tensor, density or 0.0, generator) for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * weights.view(-1, *[1] * (stacked.ndim - 1))
    if not method.endswith("ties"):
        return weighted.sum(0), 0, 0
    # The sign of a value is elected by the sum of what the adapters keep, without their weights, as in peft.
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    twice = (stacked != 0).sum(0) > 1
    conflicts = (stacked > 0).any(0) & (stacked < 0).any(0)
    merged = (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)
    return merged, int(conflicts.sum()), int(twice.sum())


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The share `density` of the values with the largest magnitude, zeros elsewhere."""
    if density >= 1:
        return tensor
    mask = torch.zeros(tensor.numel())
    mask[torch.topk(tensor.abs().flatten(), k=int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def _random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Every value with probability `density`, divided by it, so that the expectation stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def _svd_of_sum(given: Sequence[Factors], rank: int) -> Mixed:
    """SVD of `B A` for tall B and wide A: QR of both, SVD of the small product; in float64, rounded once."""
    a = torch.cat([item.a.flatten(1).double() * (item.weight * item.scaling) for item in given], 0)
    b = torch.cat([item.b.flatten(1).double() for item in given], 1)
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return _shaped(given[0], (v[:rank] @ qa.T).float(), (qb @ (u[:, :rank] * s[:rank])).float())


def _shaped(like: Factors, a: torch.Tensor, b: torch.Tensor, *, conflicts: int = 0, kept_twice: int = 0) -> Mixed:
    """Matrices in the shape of the module's own factors (a convolution's have four axes)."""
    rank = a.shape[0]
    return Mixed(
        a.reshape(rank, *like.a.shape[1:]).contiguous(),
        b.reshape(b.shape[0], rank, *like.b.shape[2:]).contiguous(),
        conflicts,
        kept_twice,
    )
