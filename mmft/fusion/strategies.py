"""How the modalities of a row become one vector: (features of each modality) -> (B, D).

M modalities, tokens `t_m` (B, T_m, D), pooled `p_m` (B, D). A modality that a row lacks comes in as its learned missing
vector (one token), except in `WeightedSum`, where it has no weight. Late fusion has no common vector: see `late`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmft.fusion.config import FusionConfig
from mmft.fusion.features import Features, share
from mmft.fusion.layers import Pooling, Transformer


class Strategy(nn.Module):
    """Base: `forward(features)` gives (B, hidden_size)."""

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        raise NotImplementedError


class EarlyFusion(Strategy):
    """`z = pool(Transformer([t_1 + e_1; ...; t_M + e_M]))`, one self-attention over the tokens of all modalities with a
    modality embedding e_m (the single-stream layout of Kiela et al. 2019, MMBT). With pooling "cls" a learned token
    stands in front. Price: quadratic in the sum of the T_m."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.types = nn.Parameter(torch.empty(len(config.modalities), config.hidden_size))
        if config.pooling == "cls":
            self.front = nn.Parameter(torch.empty(config.hidden_size))
        self.transformer = _transformer(config)
        self.pool = Pooling(config.pooling, config.hidden_size)

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        tokens = [one.tokens + kind for one, kind in zip(features, self.types, strict=True)]
        masks = [one.mask for one in features]
        if self.pool.kind == "cls":
            rows = len(tokens[0])
            tokens.insert(0, self.front.expand(rows, 1, -1))
            masks.insert(0, torch.ones(rows, 1, dtype=torch.bool, device=masks[0].device))
        mask = torch.cat(masks, dim=1)
        return self.pool(self.transformer(torch.cat(tokens, dim=1), mask), mask)


class WeightedSum(Strategy):
    """`z = sum_m a_m W_m p_m`, `a = softmax(w)` over the modalities that the row has (over all where it has none)."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count, width = len(config.modalities), config.hidden_size
        self.weights = nn.Parameter(torch.zeros(count))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        parts = torch.stack([one(f.pooled) for one, f in zip(self.maps, features, strict=True)], dim=1)
        weights = share(self.weights, torch.stack([one.present for one in features], dim=1))
        return torch.einsum("bm,bmd->bd", weights, parts)


class GatedSum(Strategy):
    """Gated multimodal unit (Arevalo et al. 2017, for more than two modalities):
    `h_m = tanh(W_m p_m)`, `g_m = sigmoid(G_m [p_1; ...; p_M])`, `z = sum_m g_m * h_m`."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count, width = len(config.modalities), config.hidden_size
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.gates = nn.ModuleList(nn.Linear(count * width, width) for _ in range(count))

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        joined = torch.cat([one.pooled for one in features], dim=-1)
        return torch.stack(
            [
                torch.sigmoid(gate(joined)) * torch.tanh(one(f.pooled))
                for one, gate, f in zip(self.maps, self.gates, features, strict=True)
            ]
        ).sum(dim=0)


class CrossAttention(Strategy):
    """Every ordered pair of modalities attends (Tsai et al. 2019, MulT):

    `Z_ab = Transformer(t_a attends to t_b)`, `Z_a = Transformer(W_a [Z_ab for b != a])`,
    `z = W [pool(Z_1); ...; pool(Z_M)]`. The map W_a to width D (MulT keeps (M - 1) D) holds the second transformer
    small; MulT's position embeddings are the encoders' own here. One modality attends to itself. Crossed
    tokens have no class token: with pooling "cls" they are averaged.
    Price: M (M - 1) transformers.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count, width = len(config.modalities), config.hidden_size
        self.pairs = [(a, b) for a in range(count) for b in range(count) if a != b or count == 1]
        self.crossing = nn.ModuleDict({f"{a}_{b}": _transformer(config) for a, b in self.pairs})
        self.narrow = nn.ModuleList(nn.Linear(max(count - 1, 1) * width, width) for _ in range(count))
        self.within = nn.ModuleList(_transformer(config) for _ in range(count))
        kind = "mean" if config.pooling == "cls" else config.pooling
        self.pools = nn.ModuleList(Pooling(kind, width) for _ in range(count))
        self.out = nn.Linear(count * width, width)

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        pooled = []
        for a, own in enumerate(features):
            seen = [
                self.crossing[f"{a}_{b}"](own.tokens, features[b].mask, features[b].tokens)
                for one, b in self.pairs
                if one == a
            ]
            states = self.within[a](self.narrow[a](torch.cat(seen, dim=-1)), own.mask)
            pooled.append(self.pools[a](states, own.mask))
        return self.out(torch.cat(pooled, dim=-1))


class LowRankTensor(Strategy):
    """Low-rank multimodal fusion (Liu et al. 2018): the outer product of all modalities, `(x)_m [p_m; 1]`, times a
    weight tensor of rank r that is never formed: `z = sum_i u_i prod_m (V_m[i] [p_m; 1]) + b`.

    Price: r (D + 1) D weights per modality instead of (D + 1)^M D. The factors start at 1 on the constant, so that the
    product of many modalities does not vanish.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count, width = len(config.modalities), config.hidden_size
        self.factors = nn.Parameter(torch.empty(count, config.rank, width + 1, width))
        self.mix = nn.Parameter(torch.empty(config.rank))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, features: Sequence[Features]) -> Tensor:
        """(B, D)."""
        product: Tensor | None = None
        for factor, one in zip(self.factors, features, strict=True):
            constant = one.pooled.new_ones(len(one.pooled), 1)
            part = torch.einsum("bk,rkd->brd", torch.cat((one.pooled, constant), dim=-1), factor)
            product = part if product is None else product * part
        assert product is not None, "a model has at least one modality"
        return torch.einsum("r,brd->bd", self.mix, product) + self.bias


def _transformer(config: FusionConfig) -> Transformer:
    return Transformer(config.hidden_size, config.num_heads, config.dropout, num_layers=config.num_layers)


STRATEGY_CLASSES: dict[str, type[Strategy]] = {
    "early": EarlyFusion,
    "hybrid": EarlyFusion,
    "weighted": WeightedSum,
    "gated": GatedSum,
    "cross_attention": CrossAttention,
    "low_rank": LowRankTensor,
}
"""Strategies with a common vector; hybrid is early fusion with late fusion beside it."""
