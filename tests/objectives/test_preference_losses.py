"""Losses of preference learning against their published formulas, in float64, with gradients."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import pytest
import torch

from mmft.objectives import preference_losses as losses
from mmft.objectives.preference import Settings, pair_loss
from mmft.objectives.preference_losses import Pair

BETA, NOISE, GAMMA = 0.3, 0.1, 0.7
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def make_pair(n: int = 6) -> tuple[Pair, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    values = [(-8 * torch.rand(n, generator=draw, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    lengths = [torch.randint(1, 9, (n,), generator=draw).double() for _ in range(2)]
    return Pair(*values, *lengths), values


def log_s(x: torch.Tensor) -> torch.Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def formulas(p: Pair) -> dict[str, torch.Tensor]:
    """Each loss as its paper writes it, from probabilities where it does."""
    w, v = p.chosen - p.reference_chosen, p.rejected - p.reference_rejected
    s = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    nc, nr = p.chosen_length, p.rejected_length
    pw, pl = torch.exp(p.chosen / nc), torch.exp(p.rejected / nr)
    return {
        "sigmoid": -log_s(BETA * (w - v)),
        "cdpo": -(1 - NOISE) * log_s(BETA * (w - v)) - NOISE * log_s(BETA * (v - w)),
        "robust": (-(1 - NOISE) * log_s(BETA * (w - v)) + NOISE * log_s(BETA * (v - w))) / (1 - 2 * NOISE),
        "hinge": torch.clamp(1 - BETA * (w - v), min=0),
        "ipo": (w / nc - v / nr - 1 / (2 * BETA)) ** 2,
        "apo_zero": 1 - s(BETA * w) + s(BETA * v),
        "apo_down": s(BETA * w) + 1 - s(BETA * (w - v)),
        "normalised": -log_s(BETA * (w / nc - v / nr)),
        "rpo": -log_s(BETA * (w - v)) - 0.4 * p.chosen / nc,
        "orpo": -torch.log(pw) - BETA * log_s(torch.log(pw / (1 - pw)) - torch.log(pl / (1 - pl))),
        "simpo": -log_s(BETA * p.chosen / nc - BETA * p.rejected / nr - GAMMA),
        "cpo": -log_s(BETA * (p.chosen - p.rejected)) - 0.4 * p.chosen / nc,
    }


SETTINGS = {
    "sigmoid": Settings(beta=BETA),
    "cdpo": Settings(beta=BETA, label_smoothing=NOISE),
    "robust": Settings(beta=BETA, label_smoothing=NOISE, loss_type="robust"),
    "hinge": Settings(beta=BETA, loss_type="hinge"),
    "ipo": Settings(beta=BETA, loss_type="ipo"),
    "apo_zero": Settings(beta=BETA, loss_type="apo_zero"),
    "apo_down": Settings(beta=BETA, loss_type="apo_down"),
    "normalised": Settings(beta=BETA, loss_type="sigmoid_norm"),
    "rpo": Settings(beta=BETA, sft_weight=0.4),
    "orpo": Settings(name="orpo", beta=BETA),
    "simpo": Settings(name="simpo", beta=BETA, gamma=GAMMA),
    "cpo": Settings(name="cpo", beta=BETA, sft_weight=0.4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pairs_equal_the_formula_and_its_gradient(name: str) -> None:
    pair, values = make_pair()
    found, wanted = pair_loss(pair, SETTINGS[name]), formulas(pair)[name]
    torch.testing.assert_close(found, wanted, **EXACT)
    ours = torch.autograd.grad(found.sum(), values, allow_unused=True, retain_graph=True)
    plain = torch.autograd.grad(wanted.sum(), values, allow_unused=True)
    for one, other in zip(ours, plain, strict=True):
        zero = torch.zeros_like(values[0])
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, **EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_small_steps(name: str) -> None:
    pair, values = make_pair(3)

    def run(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return pair_loss(Pair(chosen, rejected, *values[2:], pair.chosen_length, pair.rejected_length), SETTINGS[name])

    assert torch.autograd.gradcheck(run, tuple(values[:2]))


def test_kto_equals_its_formula_and_keeps_the_kl_out_of_the_gradient() -> None:
    ratio = torch.tensor([0.7, -1.2, 2.0, -0.3], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.5, 0.9, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, False, True])
    z = losses.kto_kl(other)
    assert float(z) == pytest.approx(0.325) and float(losses.kto_kl(-other)) == 0.0
    found = losses.kto(ratio, good, z, BETA, (1.5, 0.5))
    value = 0.325
    plain = [
        1.5 * (1 - 1 / (1 + math.exp(-BETA * (r - value))))
        if up
        else 0.5 * (1 - 1 / (1 + math.exp(-BETA * (value - r))))
        for r, up in zip(ratio.tolist(), good.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(plain, dtype=torch.float64), **EXACT)
    found.sum().backward()
    assert other.grad is None
    s = torch.sigmoid(BETA * (ratio.detach() - value))
    slope = torch.where(good, -1.5 * BETA * s * (1 - s), 0.5 * BETA * s * (1 - s))
    torch.testing.assert_close(ratio.grad, slope, **EXACT)


def test_mdpo_terms_equal_their_formulas() -> None:
    pair, values = make_pair()
    better, altered = pair.ratios
    torch.testing.assert_close(losses.conditional(better, altered, BETA), -log_s(BETA * (better - altered)), **EXACT)
    torch.testing.assert_close(losses.anchor(better, BETA), -log_s(BETA * better), **EXACT)
    own, changed = (one.detach().requires_grad_() for one in (better, altered))
    assert torch.autograd.gradcheck(lambda a, b: losses.conditional(a, b, BETA), (own, changed))
    assert torch.autograd.gradcheck(lambda a: losses.anchor(a, BETA), (own,))


def test_rankings_equal_the_product_of_choices() -> None:
    """Plackett-Luce of 3 and 2 answers, in one call; probabilities of all orders add to one."""
    rewards = torch.tensor([0.3, -1.0, 0.8, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    owner, rank = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])
    found = losses.plackett_luce(rewards, owner, rank)
    e = torch.exp(rewards)
    plain = torch.stack(
        [-torch.log(e[0] / (e[0] + e[1] + e[2]) * e[1] / (e[1] + e[2])), -torch.log(e[3] / (e[3] + e[4]))]
    )
    torch.testing.assert_close(found, plain, **EXACT)
    torch.testing.assert_close(found[1], losses.bradley_terry(rewards[3], rewards[4]), **EXACT)
    ours = torch.autograd.grad(found.sum(), rewards, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(plain.sum(), rewards)[0], **EXACT)
    total = 0.0
    for order in permutations(range(3)):
        places = torch.tensor([order.index(j) for j in range(3)])
        total += float(torch.exp(-losses.plackett_luce(rewards[:3], torch.zeros(3, dtype=torch.int64), places)).sum())
    assert total == pytest.approx(1.0)


def test_margin_moves_the_pair() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([0.2])
    assert float(losses.bradley_terry(a, b, 0.8)) == pytest.approx(math.log(2.0))


def test_odds_hold_near_one() -> None:
    """P = 1 - 1e-9 in float64: log odds is log(1e9), which log(p) - log(1 - p) of rounded numbers also is."""
    near = torch.tensor([math.log1p(-1e-9), math.log(0.5), -40.0], dtype=torch.float64)
    torch.testing.assert_close(
        losses.odds(near), torch.tensor([math.log(1e9), 0.0, -40.0], dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses.odds(zero).sum().backward()
    assert bool(torch.isfinite(losses.odds(zero)).all()) and bool(torch.isfinite(zero.grad).all())


def test_names_are_all_different() -> None:
    pair, _ = make_pair()
    values = [pair_loss(pair, setting) for setting in SETTINGS.values()]
    assert not any(torch.allclose(one, other) for one, other in combinations(values, 2))
