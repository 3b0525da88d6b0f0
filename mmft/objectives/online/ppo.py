"""PPO with a value head on the backbone's last hidden states (Schulman et al. 2017; Ouyang et al. 2022).

The value of a token is read from the hidden state before it. Rewards by token are the KL penalty and, at the end, the
answer's reward; advantages are generalised ones (gamma 1), whitened over the step's tokens; policy and value loss are
clipped and averaged over tokens. All answers of a step make one update, `num_iterations` times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmft.objectives.base import StepContext
from mmft.objectives.online.base import OnlineObjective, over_ranks
from mmft.objectives.online.formulas import (
    clipped_policy,
    clipped_share,
    clipped_value,
    gae,
    token_rewards,
    token_weights,
    whitened,
)
from mmft.objectives.online.rollout import Rollout

GAMMA = 1.0


class PpoObjective(OnlineObjective):
    """The policy and its value function."""

    name = "ppo"

    @property
    def metrics(self) -> dict[str, tuple[str, str]]:
        """Also the value loss, and the share of the returns' variance that the values leave."""
        return {
            **super().metrics,
            "value_loss": ("value_loss", "trained_tokens"),
            "value_error": ("value_error", "return_spread"),
        }

    def prepare(self, rollouts: Sequence[Rollout], step: StepContext) -> None:
        """Values, advantages, returns."""
        with step.together():
            for rollout in rollouts:
                scored = self.before(rollout, step)
                assert scored.values is not None
                mask = rollout.drawn.mask.to(scored.log_probs.device)
                rollout.old, rollout.old_values = scored.log_probs, scored.values
                rewards = token_rewards(
                    rollout.judged.total.to(scored.log_probs.device, scored.log_probs.dtype),
                    scored.log_probs,
                    rollout.reference,
                    mask,
                    kl_coef=self.section.kl_coef,
                )
                rollout.advantages = gae(rewards, scored.values, mask, gamma=GAMMA, lam=self.section.gae_lambda)
                rollout.returns = rollout.advantages + scored.values
            self._sums |= self._explained(rollouts)
        self._whiten(rollouts, step)

    def _whiten(self, rollouts: Sequence[Rollout], step: StepContext) -> None:
        """Advantages by the mean and variance of the whole step."""
        local = [0.0, 0.0, 0.0]
        for rollout in rollouts:
            inside = rollout.advantages[rollout.drawn.mask.to(rollout.advantages.device)].double()
            for place, value in enumerate((inside.new_tensor(len(inside)), inside.sum(), (inside * inside).sum())):
                local[place] += float(value)
        self._tokens, total, squares = over_ranks(local, step)
        for rollout in rollouts:
            rollout.advantages = whitened(rollout.advantages, count=self._tokens, total=total, squares=squares)

    def _explained(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Squared errors of the values before the update, and squared deviations of the returns from their mean."""
        inside = [one.drawn.mask for one in rollouts]
        returns = torch.cat(
            [one.returns.cpu()[m] for one, m in zip(rollouts, inside, strict=True) if one.returns is not None]
        )
        values = torch.cat(
            [one.old_values.cpu()[m] for one, m in zip(rollouts, inside, strict=True) if one.old_values is not None]
        )
        spread = (returns - returns.mean()).square().sum()
        return {"value_error": float((values - returns).square().sum()), "return_spread": float(spread)}

    def learn(self, rollout: Rollout, step: StepContext) -> dict[str, float]:
        """One backward through policy and values."""
        share, sums = self.share(rollout, step)
        share.backward()
        return {"loss": float(share.detach()) * step.count, **sums}

    def share(self, rollout: Rollout, step: StepContext) -> tuple[Tensor, dict[str, float]]:
        """Policy loss plus `value_coef` times the value loss of one micro-batch."""
        scored = self.policy.score(rollout.batch, rollout.rows, rollout.drawn.mask, step=step)
        found, values = scored.log_probs, scored.values
        assert values is not None and rollout.old is not None
        assert rollout.old_values is not None and rollout.returns is not None
        mask = rollout.drawn.mask.to(found.device)
        weights = token_weights(mask, "dapo", answers=1.0, tokens=self._tokens, longest=1)
        policy = clipped_policy(found, rollout.old, rollout.advantages, low=self.low, high=self.high)
        value = clipped_value(values, rollout.old_values, rollout.returns, clip=self.low)
        clipped = clipped_share(found, rollout.old, rollout.advantages, low=self.low, high=self.high) & mask
        sums = {
            "clipped": float(clipped.sum()),
            "trained_tokens": float(mask.sum()),
            "value_loss": float((value.detach() * mask).sum()),
            **(self.gap(found, rollout.drawn) if step.update == 0 else {}),
        }
        return ((policy + self.section.value_coef * value) * weights).sum(), sums
