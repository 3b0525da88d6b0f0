"""Every strategy and pooling against a plain re-derivation: one row at a time, its real tokens only, without a mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmft.fusion.features import Features, drop_modalities, share
from mmft.fusion.layers import Pooling, Transformer
from mmft.fusion.strategies import STRATEGY_CLASSES
from tests.fusion.small import small_config

WIDTH, ROWS = 16, 4
CLOSE = {"rtol": 0.0, "atol": 1e-12}  # float64: only the order of sums differs


def features(seed: int = 0) -> list[Features]:
    """Four modalities of 5, 3, 6 and 2 tokens; later rows shorter, row 2 lacks modality 1."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for at, length in enumerate((5, 3, 6, 2)):
        mask = torch.arange(length) < torch.tensor([length, max(1, length - 2), length, 1])[:, None]
        tokens = torch.randn(ROWS, length, WIDTH, generator=draw, dtype=torch.float64)
        present = torch.ones(ROWS, dtype=torch.bool)
        if at == 1:
            present[2] = False
            mask[2] = torch.arange(length) == 0
        tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        pooled = torch.stack([row[kept].mean(dim=0) for row, kept in zip(tokens, mask, strict=True)])
        out.append(Features(tokens, mask, present, pooled))
    return out


def real(one: Features, row: int) -> Tensor:
    return one.tokens[row][one.mask[row]]


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def attend(layer, queries: Tensor, memory: Tensor) -> Tensor:
    q, k, v = linear(layer.q_proj, queries), linear(layer.k_proj, memory), linear(layer.v_proj, memory)
    size = WIDTH // layer.num_heads
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
        heads.append(scores / scores.sum(dim=1, keepdim=True) @ v[:, part])
    return linear(layer.o_proj, torch.cat(heads, dim=1))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def transformer(module: Transformer, x: Tensor, memory: Tensor | None = None) -> Tensor:
    for layer in module.layers:
        source = x if memory is None else memory
        x = x + attend(layer.attention, norm(layer.attention_norm, x), norm(layer.attention_norm, source))
        x = x + linear(layer.mlp[2], gelu(linear(layer.mlp[0], norm(layer.mlp_norm, x))))
    return norm(module.norm, x)


def lstm(module: torch.nn.LSTM, x: Tensor, suffix: str) -> Tensor:
    """Last state of one direction, from the gate equations."""
    w_in, w_rec = getattr(module, f"weight_ih_l0{suffix}"), getattr(module, f"weight_hh_l0{suffix}")
    bias = getattr(module, f"bias_ih_l0{suffix}") + getattr(module, f"bias_hh_l0{suffix}")
    state = cell = torch.zeros(module.hidden_size, dtype=x.dtype)
    for step in x.flip(0) if suffix else x:
        i, f, g, o = (w_in @ step + w_rec @ state + bias).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = torch.sigmoid(o) * torch.tanh(cell)
    return state


def pool(module: Pooling, x: Tensor) -> Tensor:
    if module.kind == "attention":
        scores = torch.exp(linear(module.score[2], torch.tanh(linear(module.score[0], x))))
        return (scores / scores.sum() * x).sum(dim=0)
    if module.kind == "bilstm":
        return torch.cat([lstm(module.lstm, x, ""), lstm(module.lstm, x, "_reverse")])
    return x[0] if module.kind == "cls" else x.sum(dim=0) / len(x)


def plain_early(module, given: list[Features], row: int) -> Tensor:
    parts = [real(one, row) + module.types[at] for at, one in enumerate(given)]
    if module.pool.kind == "cls":
        parts.insert(0, module.front[None])
    return pool(module.pool, transformer(module.transformer, torch.cat(parts)))


def plain_weighted(module, given: list[Features], row: int) -> Tensor:
    there = [at for at, one in enumerate(given) if one.present[row]]
    powers = [math.exp(module.weights[at]) for at in there]
    return sum(
        power / sum(powers) * linear(module.maps[at], given[at].pooled[row])
        for power, at in zip(powers, there, strict=True)
    )


def plain_gated(module, given: list[Features], row: int) -> Tensor:
    joined = torch.cat([one.pooled[row] for one in given])
    return sum(
        1 / (1 + torch.exp(-linear(module.gates[at], joined))) * torch.tanh(linear(module.maps[at], one.pooled[row]))
        for at, one in enumerate(given)
    )


def plain_cross(module, given: list[Features], row: int) -> Tensor:
    pooled = []
    for a, own in enumerate(given):
        seen = [
            transformer(module.crossing[f"{a}_{b}"], real(own, row), real(other, row))
            for b, other in enumerate(given)
            if a != b
        ]
        pooled.append(
            pool(module.pools[a], transformer(module.within[a], linear(module.narrow[a], torch.cat(seen, 1))))
        )
    return linear(module.out, torch.cat(pooled))


def plain_low_rank(module, given: list[Features], row: int) -> Tensor:
    """The full tensor: the outer product of all [p; 1], contracted with the weight tensor written out."""
    # Narrow vectors, or the tensor of four modalities has 17^4 * 16 entries (a megabyte: fine here).
    outer = torch.ones((), dtype=torch.float64)
    for one in given:
        outer = torch.tensordot(outer, torch.cat((one.pooled[row], torch.ones(1, dtype=torch.float64))), dims=0)
    weight = sum(
        module.mix[rank] * torch.einsum("ad,bd,cd,ed->abced", *(factor[rank] for factor in module.factors))
        for rank in range(len(module.mix))
    )
    return torch.tensordot(outer, weight, dims=4) + module.bias


PLAIN = {
    "early": plain_early,
    "weighted": plain_weighted,
    "gated": plain_gated,
    "cross_attention": plain_cross,
    "low_rank": plain_low_rank,
}
CASES = [(name, "mean") for name in PLAIN]
CASES += list(itertools.product(("early", "cross_attention"), ("attention", "bilstm")))
CASES += [("early", "cls")]


def built(name: str, pooling: str, num_layers: int = 2):
    torch.manual_seed(3)
    module = STRATEGY_CLASSES[name](small_config(strategy=name, pooling=pooling, num_layers=num_layers)).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_a_strategy_equals_its_formula(name, pooling):
    module, given = built(name, pooling), features()
    with torch.no_grad():
        found = module(given)
        expected = torch.stack([PLAIN[name](module, given, row) for row in range(ROWS)])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_gradients_reach_every_weight_and_equal_differences(name, pooling):
    module, given = built(name, pooling, num_layers=1), features()
    module(given).pow(2).sum().backward()
    for key, parameter in module.named_parameters():
        # A bias of the keys shifts all scores of a query alike: its gradient is 0 by the formula.
        if not key.endswith("k_proj.bias") and "score.2.bias" not in key:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    parameter = next(module.parameters())
    at, step = tuple(0 for _ in parameter.shape), 1e-6
    values = []
    with torch.no_grad():
        for shift in (step, -2 * step):
            parameter[at] += shift
            values.append(module(given).pow(2).sum())
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(parameter.grad[at], slope, rtol=1e-5, atol=1e-6)  # a central difference's own error


def test_holes_in_a_mask_are_no_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, True]])
    for kind in ("mean", "attention", "bilstm"):
        module = Pooling(kind, WIDTH).double()
        expected = torch.stack([pool(module, tokens[row][mask[row]]) for row in range(2)])
        torch.testing.assert_close(module(tokens, mask), expected, **CLOSE)


def test_shares_are_over_what_is_present():
    weights = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    found = share(weights, present)
    e = math.e
    expected = [[1, e, e * e], [1, 0, e * e], [0, 1, 0], [1, e, e * e]]
    expected = [[x / sum(row) for x in row] for row in expected]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **CLOSE)


def test_modality_dropout_never_takes_the_last_and_draws_by_seed():
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    rows = present.repeat(5000, 1)
    draw = torch.Generator().manual_seed(0)
    kept = drop_modalities(rows, 0.5, generator=draw)
    assert not (kept & ~rows).any()
    assert (kept.any(dim=1) == rows.any(dim=1)).all()
    again = drop_modalities(rows, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept, again)
    assert not torch.equal(kept, drop_modalities(rows, 0.5, generator=torch.Generator().manual_seed(1)))
    # Closed form for three modalities at p = 1/2: kept by its own draw 1/2, or all lost (1/8) and chosen (1/3).
    share_kept = kept.view(5000, 4, 3)[:, 0].double().mean().item()
    assert share_kept == pytest.approx(1 / 2 + 1 / 24, abs=0.02)  # 4 sigma of 15000 draws is 0.016
    assert torch.equal(drop_modalities(rows, 0.0), rows)
