"""Transformer blocks and poolings that see a mask, so that padding never changes what comes out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017) of `queries` (B, S, D) to `memory` (B, T, D) where
    `mask` (B, T) is true. Four plain linear layers, so that adapters can sit on them."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D)."""
        rows, length, width = queries.shape

        def split(states: Tensor) -> Tensor:
            return states.view(rows, -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            split(self.q_proj(queries)),
            split(self.k_proj(memory)),
            split(self.v_proj(memory)),
            attn_mask=mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    """Pre-norm transformer block: `h = x + A(LN x, LN m)`, `y = h + W2 gelu(W1 LN h)`; m = x for self-attention."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """(B, S, D); `mask` belongs to `memory` (B, T, D), or to `states` when there is none."""
        normed = self.attention_norm(states)
        other = normed if memory is None else self.attention_norm(memory)
        states = states + self.dropout(self.attention(normed, other, mask))
        return states + self.dropout(self.mlp(self.mlp_norm(states)))


class Transformer(nn.Module):
    """`num_layers` blocks and a closing LayerNorm."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, states: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """(B, S, D)."""
        for layer in self.layers:
            states = layer(states, mask, memory)
        return self.norm(states)


class Pooling(nn.Module):
    """Tokens (B, T, D) and mask (B, T) with at least one true per row -> (B, D).

    mean: over the true positions. cls: the first position.
    attention: `sum_t softmax_t(v . tanh(W h_t + b)) h_t` (Yang et al. 2016, hierarchical attention).
    bilstm: last states of an LSTM in either direction over the true positions (Schuster & Paliwal 1997), side by side;
    D must be even. Price: T steps one after the other.
    """

    def __init__(self, kind: str, hidden_size: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.score = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 1))
        elif kind == "bilstm":
            self.lstm = nn.LSTM(hidden_size, hidden_size // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, D)."""
        if self.kind == "cls":
            return tokens[:, 0]
        if self.kind == "attention":
            scores = self.score(tokens).squeeze(-1).masked_fill(~mask, float("-inf"))
            return torch.einsum("bt,btd->bd", torch.softmax(scores, dim=1), tokens)
        if self.kind == "bilstm":
            # True positions first, in their order: a packed sequence has no holes.
            order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
            front = torch.take_along_dim(tokens, order.unsqueeze(-1), dim=1)
            packed = pack_padded_sequence(front, mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
            _, (last, _) = self.lstm(packed)
            return torch.cat((last[0], last[1]), dim=-1)
        return mean_of(tokens, mask)


def mean_of(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, T, D) over the true positions of (B, T); (B, D)."""
    weights = mask.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
