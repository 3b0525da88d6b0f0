"""GRPO and RLOO: each answer is compared with the other answers to its own question, so no value function is needed.

GRPO (Shao et al. 2024): PPO's clipped loss by token, advantages by group, `kl_coef` times k3 in the loss; with
`variant` DAPO's or Dr. GRPO's weights of tokens. RLOO (Ahmadian et al. 2024): the whole answer is one action, `r -
kl_coef log(policy / reference)` is compared with the mean of the others. Groups in which all answers are worth the
same have advantages of 0; where nothing else pulls on them (no `kl_coef`) they are left out of the forward.
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
    equal_groups,
    group_advantages,
    k3,
    leave_one_out,
    token_weights,
)
from mmft.objectives.online.policy import Policy
from mmft.objectives.online.rollout import Judge, Judged, Rollout, part_of
from mmft.objectives.online.sampling import Sampler
from mmft.recipe.schema import ObjectiveSection


class GroupObjective(OnlineObjective):
    """`name` is grpo or rloo."""

    def __init__(self, policy: Policy, sampler: Sampler, judge: Judge, *, section: ObjectiveSection, seed: int) -> None:
        super().__init__(policy, sampler, judge, section=section, seed=seed)
        self.name = section.name
        self._answers, self._tokens = 0.0, 0.0

    def prepare(self, rollouts: Sequence[Rollout], step: StepContext) -> None:
        """Advantages by group; groups without any are dropped."""
        local = [sum(len(one.drawn.tokens) for one in rollouts), sum(int(one.drawn.mask.sum()) for one in rollouts)]
        self._answers, self._tokens = over_ranks(local, step)
        self._rollouts = [kept for one in rollouts if (kept := self._learned_from(one, step)) is not None]

    def _learned_from(self, rollout: Rollout, step: StepContext) -> Rollout | None:
        section, total = self.section, rollout.judged.total
        if self.name == "rloo" and section.kl_coef and rollout.reference is not None:
            rollout.old = self.before(rollout, step).log_probs.cpu()
            apart = (rollout.old - rollout.reference.cpu()) * rollout.drawn.mask
            total = total - section.kl_coef * apart.sum(1)
        grouped = rollout.groups(total)
        scale = section.variant != "dr_grpo"
        advantages = leave_one_out(grouped) if self.name == "rloo" else group_advantages(grouped, scale=scale)
        rollout.advantages = advantages.reshape(-1)
        keep = ~equal_groups(grouped)
        if section.kl_coef or bool(keep.all()):
            return rollout
        if not bool(keep.any()):
            return None
        batch, drawn = part_of(rollout.batch, rollout.drawn, keep, k=rollout.k, pad_token_id=self.policy.pad_token_id)
        answers = keep.repeat_interleave(rollout.k)
        judged = Judged(total[answers], rollout.judged.true[answers], {})
        return Rollout(batch, self.policy.rows(batch, drawn), drawn, judged, rollout.advantages[answers])

    def learn(self, rollout: Rollout, step: StepContext) -> dict[str, float]:
        """One backward."""
        share, sums = self.share(rollout, step)
        share.backward()
        return {"loss": float(share.detach()) * step.count, **sums}

    def share(self, rollout: Rollout, step: StepContext) -> tuple[Tensor, dict[str, float]]:
        """The clipped loss of one micro-batch."""
        mask = rollout.drawn.mask
        found = self.policy.score(rollout.batch, rollout.rows, mask, step=step).log_probs
        sums = self.gap(found, rollout.drawn) if step.update == 0 else {}
        if rollout.old is None or step.update == 0:
            rollout.old = found.detach()
        mask, old = mask.to(found.device), rollout.old.to(found.device)
        advantages = rollout.advantages.to(found.device, found.dtype)[:, None]
        if self.name == "rloo":
            found, old = (found * mask).sum(1, keepdim=True), (old * mask).sum(1, keepdim=True)
            weights = torch.full_like(old, 1.0 / self._answers)
        else:
            weights = token_weights(
                mask, self.section.variant, answers=self._answers, tokens=self._tokens, longest=self.sampler.longest
            )
        loss = clipped_policy(found, old, advantages, low=self.low, high=self.high)
        clipped = clipped_share(found, old, advantages, low=self.low, high=self.high) & (weights > 0)
        if self.name == "grpo" and self.section.kl_coef and rollout.reference is not None:
            loss = loss + self.section.kl_coef * k3(found, rollout.reference.to(found.device)) * mask
        sums |= {"clipped": float(clipped.sum()), "trained_tokens": float((weights > 0).sum())}
        return (loss * weights).sum(), sums
