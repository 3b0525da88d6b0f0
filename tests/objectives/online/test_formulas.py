"""Every formula of online RL against its definition, written out by plain loops in float64, gradients included."""

from __future__ import annotations

import math

import pytest
import torch

from mmft.objectives.online import formulas as f

N, C, V, P, K = 6, 5, 11, 2, 3
LENGTHS = (5, 3, 1, 4, 2, 5)
MASK = torch.arange(C)[None, :] < torch.tensor(LENGTHS)[:, None]


def drawn(seed: int, *shape: int, grad: bool = False) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_(grad)


def same_with_gradients(found: torch.Tensor, wanted: torch.Tensor, *inputs: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad(found.sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad(wanted.sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def ratio(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.exp(new) / torch.exp(old)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probs(temperature):
    logits, tokens = drawn(0, N, V, grad=True), torch.tensor([0, 3, 10, 4, 4, 7])
    found = f.token_log_probs(logits, tokens, temperature=temperature)
    rows = []
    for row, token in zip(logits, tokens, strict=True):
        scaled = torch.exp(row / temperature)
        rows.append(torch.log(scaled[token] / scaled.sum()))
    same_with_gradients(found, torch.stack(rows), logits)


def test_group_advantages():
    rewards = drawn(1, P, K)
    plain, scaled = f.group_advantages(rewards, scale=False), f.group_advantages(rewards)
    for p in range(P):
        values = rewards[p].tolist()
        mean = sum(values) / K
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (K - 1))
        for k in range(K):
            assert float(plain[p, k]) == pytest.approx(values[k] - mean, abs=1e-12)
            assert float(scaled[p, k]) == pytest.approx((values[k] - mean) / (std + 1e-4), abs=1e-10)


def test_leave_one_out():
    rewards = drawn(2, P, K)
    found = f.leave_one_out(rewards)
    for p in range(P):
        for k in range(K):
            others = [float(rewards[p, j]) for j in range(K) if j != k]
            assert float(found[p, k]) == pytest.approx(float(rewards[p, k]) - sum(others) / (K - 1), abs=1e-12)


def test_equal_rewards_have_advantages_of_exactly_zero():
    rewards = torch.tensor([[0.1 + 0.2] * 7, [0.0, 1.0] + [0.5] * 5], dtype=torch.float32)
    for advantages in (f.group_advantages(rewards), f.group_advantages(rewards, scale=False), f.leave_one_out(rewards)):
        assert bool((advantages[0] == 0).all()) and bool((advantages[1, :2] != 0).all())
    assert f.equal_groups(rewards).tolist() == [True, False]


def test_k3():
    new, reference = drawn(3, N, C, grad=True), drawn(4, N, C)
    q = torch.exp(reference) / torch.exp(new)
    same_with_gradients(f.k3(new, reference), q - torch.log(q) - 1, new)
    assert bool((f.k3(new, reference) >= 0).all())


def test_k3_is_the_divergence_in_the_mean():
    """Exactly, by summing over all tokens instead of drawing them."""
    p, r = drawn(5, V).log_softmax(0), drawn(6, V).log_softmax(0)
    assert float((p.exp() * f.k3(p, r)).sum()) == pytest.approx(float((p.exp() * (p - r)).sum()), rel=1e-10)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28)])
def test_clipped_policy(low, high):
    new, old, advantages = drawn(7, N, C, grad=True), drawn(8, N, C), drawn(9, N, C)
    old = (new.detach() + 0.4 * old).detach()
    q = ratio(new, old)
    wanted = torch.stack(
        [
            -min(q[i, t] * advantages[i, t], q[i, t].clamp(1 - low, 1 + high) * advantages[i, t], key=float)
            for i in range(N)
            for t in range(C)
        ]
    ).reshape(N, C)
    found = f.clipped_policy(new, old, advantages, low=low, high=high)
    same_with_gradients(found, wanted, new)
    clipped = f.clipped_share(new, old, advantages, low=low, high=high)
    (gradient,) = torch.autograd.grad(f.clipped_policy(new, old, advantages, low=low, high=high).sum(), new)
    assert torch.equal(clipped, gradient == 0) and 0 < int(clipped.sum()) < N * C


def test_at_the_first_update_the_gradient_is_that_of_reinforce():
    new, advantages = drawn(10, N, C, grad=True), drawn(11, N, C)
    (found,) = torch.autograd.grad(f.clipped_policy(new, new.detach(), advantages, low=0.2, high=0.2).sum(), new)
    torch.testing.assert_close(found, -advantages)


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_token_weights(how):
    losses, longest = drawn(12, N, C, grad=True), 8
    weights = f.token_weights(
        MASK, how, answers=float(N), tokens=float(sum(LENGTHS)), longest=longest, dtype=torch.float64
    )
    kept = [losses[i, : LENGTHS[i]] for i in range(N)]
    wanted = {
        "grpo": sum(row.mean() for row in kept) / N,
        "dapo": torch.cat(kept).mean(),
        "dr_grpo": sum(row.sum() for row in kept) / (N * longest),
    }[how]
    same_with_gradients((losses * weights).sum(), wanted, losses)


def test_grpo_whole():
    """Equation 3 of Shao et al. (2024): the mean over answers of the mean over tokens of clip(q) A - beta k3."""
    new, old, reference = drawn(13, N, C, grad=True), drawn(14, N, C), drawn(15, N, C)
    rewards, beta = drawn(16, P, K), 0.04
    advantages = f.group_advantages(rewards).reshape(-1, 1)
    loss = f.clipped_policy(new, old, advantages, low=0.2, high=0.2) + beta * f.k3(new, reference)
    weights = f.token_weights(MASK, "grpo", answers=float(N), tokens=1.0, longest=1, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        group = rewards[i // K]
        advantage = (group[i % K] - group.mean()) / (group.std() + 1e-4)
        for t in range(LENGTHS[i]):
            q, r = ratio(new[i, t], old[i, t]), ratio(reference[i, t], new[i, t])
            surrogate = torch.minimum(q * advantage, torch.clamp(q, 0.8, 1.2) * advantage)
            total = total - (surrogate - beta * (r - torch.log(r) - 1)) / LENGTHS[i] / N
    same_with_gradients((loss * weights).sum(), total, new)


def test_token_rewards():
    scores, new, reference = drawn(17, N), drawn(18, N, C), drawn(19, N, C)
    found = f.token_rewards(scores, new, reference, MASK, kl_coef=0.3)
    for i in range(N):
        for t in range(C):
            wanted = -0.3 * float(new[i, t] - reference[i, t]) if t < LENGTHS[i] else 0.0
            wanted += float(scores[i]) if t == LENGTHS[i] - 1 else 0.0
            assert float(found[i, t]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae(gamma, lam):
    """The sum of Schulman et al. (2016), equation 16, over what is left of each answer."""
    rewards, values = drawn(20, N, C), drawn(21, N, C)
    found = f.gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for i in range(N):
        v = [*values[i, : LENGTHS[i]].tolist(), 0.0]
        deltas = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(LENGTHS[i])]
        for t in range(C):
            wanted = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, LENGTHS[i]))
            assert float(found[i, t]) == pytest.approx(wanted, abs=1e-10)


def test_clipped_value():
    values, old, returns = drawn(22, N, C, grad=True), drawn(23, N, C), drawn(24, N, C)
    found = f.clipped_value(values, old, returns, clip=0.3)
    rows = []
    for v, o, r in zip(values.flatten(), old.flatten(), returns.flatten(), strict=True):
        near = o + torch.clamp(v - o, -0.3, 0.3)
        rows.append(0.5 * torch.maximum((v - r) ** 2, (near - r) ** 2))
    same_with_gradients(found, torch.stack(rows).reshape(N, C), values)


def test_whitened():
    values = drawn(25, N, C)
    inside = values[MASK]
    found = f.whitened(
        values, count=float(len(inside)), total=float(inside.sum()), squares=float((inside * inside).sum())
    )
    torch.testing.assert_close(found, (values - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt())
    assert float(found[MASK].mean()) == pytest.approx(0.0, abs=1e-12)


def test_ppo_whole():
    """Policy and value loss of a step, by plain loops."""
    new, old, v, v_old = drawn(26, N, C, grad=True), drawn(27, N, C), drawn(28, N, C, grad=True), drawn(29, N, C)
    advantages, returns = drawn(30, N, C), drawn(31, N, C)
    weights = f.token_weights(MASK, "dapo", answers=1.0, tokens=float(MASK.sum()), longest=1, dtype=torch.float64)
    policy = f.clipped_policy(new, old, advantages, low=0.2, high=0.2)
    found = ((policy + 0.1 * f.clipped_value(v, v_old, returns, clip=0.2)) * weights).sum()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        for t in range(LENGTHS[i]):
            q, a = ratio(new[i, t], old[i, t]), advantages[i, t]
            near = v_old[i, t] + torch.clamp(v[i, t] - v_old[i, t], -0.2, 0.2)
            error = torch.maximum((v[i, t] - returns[i, t]) ** 2, (near - returns[i, t]) ** 2)
            total = total + torch.maximum(-a * q, -a * torch.clamp(q, 0.8, 1.2)) + 0.1 * 0.5 * error
    same_with_gradients(found, total / int(MASK.sum()), new, v)
