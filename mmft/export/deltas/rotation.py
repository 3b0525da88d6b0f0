"""Orthogonal fine-tuning: `W' = W Rᵀ` with a block-diagonal rotation of the inputs, so row blocks stay row blocks.

OFT: Qiu et al. 2023 (arXiv 2306.07280), with the Cayley-Neumann series of Qiu et al. 2025 (arXiv 2506.19847); BOFT:
Liu et al. 2024 (arXiv 2311.06243), a product of permuted block-diagonal rotations and a scale of each output. A step
holds the small rotations, never the whole `R`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmft.export.deltas.base import Adapter, Homeless, Matrix, Merge, Site, Step, is_conv, is_linear

OFT_PARTS = ("oft_R", "oft_embedding_R")
OFT_FIELDS = frozenset(
    {"oft_block_size", "module_dropout", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    | {"init_weights", "fan_in_fan_out"}
)
BOFT_PARTS = ("boft_R", "boft_s")
BOFT_FIELDS = frozenset(
    {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights", "fan_in_fan_out"}
)

DENSE = 1024
"""Up to this width the whole rotation is multiplied, as peft does: its sums then have peft's very bits. Wider ones go
block by block, in `b / width` of the time, and differ in the last place of float32."""


@dataclass(frozen=True)
class Oft:
    """`terms` of the Neumann series (0 solves the Cayley transform); `eps` bounds each block (constrained OFT)."""

    key: str
    block: int
    terms: int
    eps: float | None
    left: bool  # W R instead of W Rᵀ: an embedding's vectors are rotated themselves
    kind: str = "oft"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its one tensor."""
        return (self.key,)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the blocks (in / b, b, b) of the rotation, or the one that all share."""
        skew = skew_of(adapter.factor(self.key), self.block)
        if self.eps is not None:
            limit = self.eps / torch.sqrt(torch.tensor(skew.shape[0]))
            size = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = torch.where(size <= limit, skew, limit * (skew / size))
        turn = _neumann(skew, self.terms) if self.terms else _cayley(skew)
        count = weight.width // self.block
        dense = torch.block_diag(*turn.expand(count, -1, -1)) if weight.width <= DENSE else None
        turn = turn.transpose(1, 2) if self.left else turn

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            plain = rows.to(torch.float32)
            if dense is not None:
                turned = torch.mm(plain, dense) if self.left else torch.mm(dense, plain.T).T
            else:
                turned = _turn(turn, plain)
            merged = turned.to(rows.dtype)
            return merged, merged.float() - rows.float()

        return merge


def skew_of(vectors: torch.Tensor, block: int) -> torch.Tensor:
    """(blocks, b(b-1)/2) upper triangles -> (blocks, b, b) skew-symmetric matrices."""
    row, column = torch.triu_indices(block, block, 1)
    matrix = vectors.new_zeros(vectors.shape[0], block, block)
    matrix[:, row, column] = vectors
    return matrix - matrix.transpose(1, 2)


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    # I + 2Q + 2Q² + … + Qⁿ: the last power once, as peft cuts the series
    turn = torch.eye(skew.shape[1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms > 1:
        turn.add_(skew, alpha=2.0)
    if terms > 2:
        power = torch.bmm(skew, skew)
        turn.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = torch.bmm(power, skew)
            turn.add_(power, alpha=2.0)
        turn.add_(torch.bmm(power, skew))
    return turn


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    one = torch.eye(skew.shape[1], dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def _turn(blocks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, in) times the transposed block-diagonal matrix; one block may serve all."""
    size = blocks.shape[1]
    count = rows.shape[1] // size
    parts = rows.view(-1, count, size).permute(1, 2, 0)  # (blocks, b, n)
    return torch.bmm(blocks.expand(count, size, size), parts).permute(2, 0, 1).reshape(rows.shape)


@dataclass(frozen=True)
class Boft:
    """`factors` butterflies of `count` blocks of size `block` each."""

    key: str
    scale: str
    factors: int
    count: int
    block: int
    kind: str = "boft"

    @property
    def keys(self) -> tuple[str, ...]:
        """Rotations and scale."""
        return (self.key, self.scale)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds all blocks and the scale."""
        raw = adapter.factor(self.key).flatten(0, 1)
        turns = _cayley(0.5 * (raw - raw.transpose(1, 2))).view(self.factors, self.count, self.block, self.block)
        scale = adapter.factor(self.scale).reshape(-1, 1)
        orders = [butterfly(weight.width, self.block, level, self.factors) for level in range(self.factors)]
        backs = [order.argsort() for order in orders]
        dense = torch.block_diag(*turns[0]) if self.factors == 1 and weight.width <= DENSE else None

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            turned = rows.to(torch.float32)
            if dense is not None:
                merged = (torch.mm(dense, turned.T).T * scale[start:stop]).to(rows.dtype)
                return merged, merged.float() - rows.float()
            for level, blocks in enumerate(turns):
                # P B Pᵀ x: into the butterfly's order, through the blocks, and back
                turned = _turn(blocks, turned[:, backs[level]])[:, orders[level]]
            merged = (turned * scale[start:stop]).to(rows.dtype)
            return merged, merged.float() - rows.float()

        return merge


def butterfly(width: int, block: int, level: int, factors: int) -> torch.Tensor:
    """The permutation of one butterfly level: in spans of `block · 2^level`, half blocks at even places come first."""
    order = torch.arange(width)
    if factors == 1:
        return order
    halves = order.view(-1, 2 << level, block // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).reshape(-1)


def oft_steps(site: Site) -> list[tuple[str, Step]]:
    """The step of one module."""
    embedding = isinstance(site.layer, torch.nn.Embedding)
    key = site.need("oft_embedding_R.weight" if embedding else "oft_R.weight")
    if not (embedding or is_linear(site.layer) or is_conv(site.layer)) or getattr(site.layer, "groups", 1) != 1:
        raise site.refuse("OFT", "Linear, Embedding, Conv2d with one group")
    blocks, elements = site.adapter.shape(key)
    block = (1 + math.isqrt(1 + 8 * elements)) // 2
    width = math.prod(site.shape()[1:])
    shared = bool(site.option("block_share"))
    if block * (block - 1) // 2 != elements or width % block or blocks != (1 if shared else width // block):
        raise Homeless
    terms = int(site.option("num_cayley_neumann_terms") or 5) if site.option("use_cayley_neumann") else 0
    eps = float(site.option("eps")) if site.option("coft") else None
    return [(site.name(), Oft(key, block, terms, eps, embedding))]


def boft_steps(site: Site) -> list[tuple[str, Step]]:
    """The step of one module."""
    if not (is_linear(site.layer) or is_conv(site.layer)) or getattr(site.layer, "groups", 1) != 1:
        raise site.refuse("BOFT", "Linear, Conv2d with one group")
    key, scale = site.need("boft_R"), site.need("boft_s")
    shape = site.adapter.shape(key)
    width = math.prod(site.shape()[1:])
    if len(shape) != 4 or shape[1] * shape[2] != width or math.prod(site.adapter.shape(scale)) != site.shape()[0]:
        raise Homeless
    return [(site.name(), Boft(key, scale, shape[0], shape[1], shape[2]))]
