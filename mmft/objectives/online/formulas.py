"""The formulas of online RL on padded tensors: `(N, C)` answers by tokens, `mask` true at real tokens.

All are written in the type they are given, so that tests can ask for them in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weighting = Literal["grpo", "dapo", "dr_grpo"]
STD_FLOOR = 1e-4
"""Added to a group's standard deviation, as in TRL."""


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`log softmax(logits / temperature)[token]`: logits (n, V), tokens (n,); float32 or wider."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return -F.cross_entropy(scores, tokens, reduction="none")


def group_advantages(rewards: Tensor, *, scale: bool = True) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): `(r - mean) / (std + 1e-4)` over each group's k answers, of (P, k).

    Without `scale` Dr. GRPO's `r - mean` (Liu et al. 2025, arXiv 2503.20783). `std` is the sample's (k - 1). A group
    of equal rewards has advantages of exactly 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + STD_FLOOR)
    return torch.where(equal_groups(rewards)[:, None], torch.zeros_like(centred), centred)


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): each reward minus the mean of the k - 1 others, rewards (P, k)."""
    k = rewards.shape[1]
    advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return torch.where(equal_groups(rewards)[:, None], torch.zeros_like(advantages), advantages)


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups (rows) have one and the same reward for all answers."""
    return rewards.amax(1) == rewards.amin(1)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimator of KL(policy || reference) by token: `exp(d) - d - 1` with `d = reference - log_probs`.

    Never negative and without bias for tokens drawn from the policy.
    """
    difference = reference - log_probs
    return difference.exp() - difference - 1


def clipped_policy(log_probs: Tensor, old: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """PPO's loss by entry (Schulman et al. 2017): `-min(q A, clip(q, 1 - low, 1 + high) A)`, `q = exp(new - old)`.

    `high > low` is DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476).
    """
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_share(log_probs: Tensor, old: Tensor, advantages: Tensor, *, low: float, high: float) -> Tensor:
    """Where the clipped branch holds, so that no gradient flows (bool)."""
    ratio = (log_probs - old).exp()
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def token_weights(
    mask: Tensor, how: Weighting, *, answers: float, tokens: float, longest: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each token's loss is multiplied with; the step's loss is the sum over all tokens of all ranks.

    `grpo`: mean over answers of the mean over their tokens. `dapo`: mean over all tokens of the step. `dr_grpo`: sum
    over tokens by `answers * longest`, which does not favour short right or long wrong answers. `answers` and `tokens`
    count the whole step.
    """
    weights = mask.to(dtype)
    if how == "grpo":
        return weights / mask.sum(1, keepdim=True).clamp(min=1) / answers
    return weights / (tokens if how == "dapo" else answers * longest)


def token_rewards(
    scores: Tensor, log_probs: Tensor, reference: Tensor | None, mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Rewards by token (Ouyang et al. 2022): `-kl_coef (log_probs - reference)`, and the answer's score at its end."""
    found = torch.zeros_like(log_probs)
    if kl_coef and reference is not None:
        found = -kl_coef * (log_probs - reference) * mask
    last = mask.sum(1) - 1
    found[torch.arange(len(found), device=found.device), last] += scores
    return found


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (Schulman et al. 2016): `A_t = d_t + gamma lam A_{t+1}`,
    `d_t = r_t + gamma V_{t+1} - V_t`, with `V = 0` behind an answer's end; 0 outside of the mask."""
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])
    for place in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, place]
        delta = rewards[:, place] + gamma * following - values[:, place]
        ahead = torch.where(here, delta + gamma * lam * ahead, torch.zeros_like(ahead))
        following = torch.where(here, values[:, place], torch.zeros_like(following))
        advantages[:, place] = ahead
    return advantages


def clipped_value(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """`1/2 max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2)` by token, PPO's clipped value loss."""
    near = torch.maximum(torch.minimum(values, old + clip), old - clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def whitened(values: Tensor, *, count: float, total: float, squares: float) -> Tensor:
    """`(x - mean) / sqrt(variance + 1e-8)` by sums over the whole step (of all ranks); variance by count."""
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0)
    return (values - mean) / (variance + 1e-8) ** 0.5
