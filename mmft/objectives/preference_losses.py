"""Losses of preference learning as plain functions of log-probabilities, with their formulas and sources.

A log-probability of an answer y to x is the sum over its tokens, `log p(y|x)`, under the policy (p) or the reference
(q). `r = log p - log q` is the log-ratio of an answer; w is the better answer, l the worse; `s` is the logistic
function. Every function gives one loss a pair (or an answer), of the type it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Log-probabilities of the better and the worse answers, (B,) each, and their numbers of tokens."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """`r_w` and `r_l`."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def normalised(self) -> Pair:
        """The same with each log-probability divided by its answer's length (a mean over tokens)."""
        one = torch.ones_like(self.chosen)
        return Pair(
            self.chosen / self.chosen_length,
            self.rejected / self.rejected_length,
            self.reference_chosen / self.chosen_length,
            self.reference_rejected / self.rejected_length,
            one,
            one,
        )


# ---------------------------------------------------------------- with a reference


def sigmoid(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """DPO: `-log s(beta (r_w - r_l))` (Rafailov et al. 2023, eq. 7); with smoothing e cDPO (Mitchell 2023):
    `-(1 - e) log s(beta (r_w - r_l)) - e log s(-beta (r_w - r_l))`."""
    better, worse = pair.ratios
    margin = beta * (better - worse)
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def robust(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """Unbiased under flipped labels at the rate e (Chowdhury et al. 2024, eq. 12):
    `(-(1 - e) log s(beta (r_w - r_l)) + e log s(-beta (r_w - r_l))) / (1 - 2 e)`."""
    better, worse = pair.ratios
    margin = beta * (better - worse)
    return (-(1.0 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)) / (1.0 - 2.0 * smoothing)


def hinge(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """SLiC's loss on log-ratios (Zhao et al. 2023; Liu et al. 2024, RSO, eq. 11): `max(0, 1 - beta (r_w - r_l))`."""
    better, worse = pair.ratios
    return torch.relu(1.0 - beta * (better - worse))


def ipo(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """IPO: `(r_w/|w| - r_l/|l| - 1/(2 beta))^2` (Azar et al. 2023, eq. 17, on means over tokens, which is what its
    authors computed)."""
    better, worse = pair.normalised().ratios
    return (better - worse - 1.0 / (2.0 * beta)) ** 2


def apo_zero(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """APO-zero: `1 - s(beta r_w) + s(beta r_l)` (D'Oosterlinck et al. 2024, eq. 7): better answers up, worse down."""
    better, worse = pair.ratios
    return 1.0 - torch.sigmoid(beta * better) + torch.sigmoid(beta * worse)


def apo_down(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """APO-down: `s(beta r_w) + 1 - s(beta (r_w - r_l))` (D'Oosterlinck et al. 2024, eq. 8): for a model better than
    both answers."""
    better, worse = pair.ratios
    return torch.sigmoid(beta * better) + 1.0 - torch.sigmoid(beta * (better - worse))


def sigmoid_norm(pair: Pair, beta: float, smoothing: float = 0.0) -> Tensor:
    """`sigmoid` of means over tokens (Lambert et al. 2024, Tulu 3, eq. 6): length gives no advantage."""
    return sigmoid(pair.normalised(), beta, smoothing)


DPO_LOSSES: dict[str, Callable[[Pair, float, float], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
}
"""By the value of `objective.loss_type`."""


def conditional(chosen: Tensor, altered: Tensor, beta: float) -> Tensor:
    """mDPO's image term: `-log s(beta (r(w|image) - r(w|altered image)))` (Wang et al. 2024, eq. 4). Takes log-ratios:
    the better answer must be likelier with its own picture than with a changed one."""
    return -F.logsigmoid(beta * (chosen - altered))


def anchor(chosen: Tensor, beta: float) -> Tensor:
    """mDPO's anchor: `-log s(beta r_w)` (Wang et al. 2024, eq. 5 with d = 0): the better answer's reward stays above
    zero."""
    return -F.logsigmoid(beta * chosen)


def kto(ratio: Tensor, good: Tensor, kl: Tensor, beta: float, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 8), of single answers: `lambda_d (1 - s(beta (r - z)))` for a good one and
    `lambda_u (1 - s(beta (z - r)))` for a bad one, z = `kl` without gradient."""
    z = kl.detach()
    up = weights[0] * (1.0 - torch.sigmoid(beta * (ratio - z)))
    down = weights[1] * (1.0 - torch.sigmoid(beta * (z - ratio)))
    return torch.where(good, up, down)


def kto_kl(mismatched: Tensor) -> Tensor:
    """KTO's z: `max(0, mean of r(y'|x))` over answers y' to other prompts (Ethayarajh et al. 2024, section 4.2)."""
    return mismatched.detach().mean().clamp(min=0.0)


# ---------------------------------------------------------------- without a reference


def nll(logp: Tensor, length: Tensor) -> Tensor:
    """`-log p(w) / |w|`: the supervised loss of an answer, a mean over its tokens (RPO, Pang et al. 2024, eq. 1)."""
    return -logp / length


def odds(mean_logp: Tensor) -> Tensor:
    """`log(P / (1 - P))` of `P = exp(mean log-probability)`, without cancellation at P near 1."""
    # log(1 - exp(x)) for x < 0: expm1 near zero, log1p far from it (Maechler 2012).
    near = mean_logp > -0.693
    safe = torch.where(near, mean_logp, torch.full_like(mean_logp, -0.5)).clamp(max=-1e-12)
    far = torch.where(near, torch.full_like(mean_logp, -1.0), mean_logp)
    rest = torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(far)))
    return mean_logp - rest


def orpo(pair: Pair, beta: float) -> Tensor:
    """ORPO: `-log p(w)/|w| - beta log s(log odds(w) - log odds(l))`, odds of mean log-probabilities (Hong et al. 2024,
    eq. 6 and 7)."""
    one = pair.normalised()
    return -one.chosen - beta * F.logsigmoid(odds(one.chosen) - odds(one.rejected))


def simpo(pair: Pair, beta: float, gamma: float) -> Tensor:
    """SimPO: `-log s(beta log p(w)/|w| - beta log p(l)/|l| - gamma)` (Meng et al. 2024, eq. 6)."""
    one = pair.normalised()
    return -F.logsigmoid(beta * (one.chosen - one.rejected) - gamma)


def cpo(pair: Pair, beta: float) -> Tensor:
    """CPO's preference part: `-log s(beta (log p(w) - log p(l)))` (Xu et al. 2024, eq. 3); its supervised part is
    `nll`."""
    return -F.logsigmoid(beta * (pair.chosen - pair.rejected))


# ---------------------------------------------------------------- rewards


def plackett_luce(rewards: Tensor, owner: Tensor, rank: Tensor) -> Tensor:
    """One loss a ranking: `-sum over j < k of log(exp(r_j) / sum over i >= j of exp(r_i))` (Plackett 1975; Luce 1959).

    `rewards` (R,) of answers that belong to rankings `owner` 0..B-1 at `rank` 0 (best), 1, ... For two answers this is
    the Bradley-Terry loss `-log s(r_w - r_l)`.
    """
    rankings, size = int(owner.max()) + 1, int(rank.max()) + 1
    table = rewards.new_full((rankings, size), float("-inf")).index_put((owner, rank), rewards)
    there = torch.zeros(rankings, size, dtype=torch.bool, device=rewards.device).index_put(
        (owner, rank), torch.ones_like(owner, dtype=torch.bool)
    )
    behind = torch.logcumsumexp(table.flip(1), dim=1).flip(1)
    terms = torch.where(there, behind, 0.0) - torch.where(there, table, 0.0)
    return terms.sum(dim=1)


def bradley_terry(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """`-log s(r_w - r_l - m)` (Bradley & Terry 1952; the margin of Touvron et al. 2023, Llama 2, eq. 2)."""
    return -F.logsigmoid(better - worse - margin)
