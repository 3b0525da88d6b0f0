"""A step of online RL: sample answers to the step's questions, judge them, learn from them once or several times.

The gradients of each update are made from the same answers; their probabilities before the first update are kept, so
the ratio is exactly 1 in the first. Checkpoints lie between steps, and a step starts with new answers whose random
numbers follow from its number, so a resumed run samples what the interrupted one would have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.prompts import PromptBatch
from mmft.errors import BackboneError
from mmft.objectives.base import Loss, StepContext, by_source
from mmft.objectives.online.formulas import equal_groups, k3
from mmft.objectives.online.policy import Policy, Scored
from mmft.objectives.online.rollout import Attempt, Judge, Rollout, part_of
from mmft.objectives.online.sampling import Drawn, Sampler, uniforms
from mmft.recipe.schema import ObjectiveSection

GAPS = {torch.float32: (1e-3, 1e-4), torch.float16: (1e-1, 1e-2), torch.bfloat16: (1.0, 5e-2)}
"""By the type products are computed in: by how much sampler and trainer may differ in the log-probability of one token,
and on average. The two pad on different sides and multiply matrices of different shapes, so they round differently."""


class OnlineObjective(ABC):
    """What GRPO, RLOO and PPO have in common; `loss` in a subclass is the policy's."""

    name: str
    told_by_source = "reward"
    """Of each data set; a policy's loss says nothing by set: within a group of answers advantages add up to 0."""

    def __init__(self, policy: Policy, sampler: Sampler, judge: Judge, *, section: ObjectiveSection, seed: int) -> None:
        self.policy, self.sampler, self.judge = policy, sampler, judge
        self.section, self.seed = section, seed
        self.updates = section.num_iterations
        self.low, self.high = section.clip
        self.agreement: dict[str, float] | None = None
        self._rollouts: list[Rollout] = []
        self._sums: dict[str, float] = {}

    @property
    def metrics(self) -> Mapping[str, tuple[str, str]]:
        """Means over the sampled answers, their tokens, or the groups of a question's answers; `first_sampler_gap` is
        the largest difference that the check at the start of this process found."""
        parts = {f"reward_{name}": (f"reward_{name}", "answers") for name in self.judge.names}
        return {
            "reward": ("reward", "answers"),
            "score": ("score", "answers"),
            **(parts if len(parts) > 1 else {}),
            "kl": ("kl", "kl_tokens"),
            "entropy": ("entropy", "tokens"),
            "answer_tokens": ("tokens", "answers"),
            "unfinished": ("unfinished", "answers"),
            "equal_groups": ("equal_groups", "count"),
            "clipped": ("clipped", "trained_tokens"),
            "sampler_gap": ("gap", "gap_tokens"),
            "first_sampler_gap": ("first_gap", "ranks"),
        }

    def count(self, batch: Batch) -> int:
        """Questions of the batch."""
        return batch.supervised

    def settle(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing has bounds."""
        return None

    # -- training ---------------------------------------------------------------------------------------------------

    def backward(self, model: nn.Module, micros: Sequence[Batch], step: StepContext) -> dict[str, float]:
        """Sample at the first update of a step; this rank's share of the update's gradients."""
        if step.update == 0:
            with step.together():
                self._rollouts = [self._collect(batch, step) for batch in micros]
                self._sums = self._watched(step)
                if self.agreement is None:
                    self._check_agreement(step)
            self._sums |= {"first_gap": (self.agreement or {}).get("largest", 0.0), "ranks": 1.0}
            self.prepare(self._rollouts, step)
        sums = {**self._sums, "loss": 0.0}
        for rollout in self._rollouts:
            for name, value in self.learn(rollout, step).items():
                sums[name] = sums.get(name, 0.0) + value
        self._sums |= {name: sums[name] for name in ("gap", "gap_tokens") if name in sums}
        return sums

    @abstractmethod
    def prepare(self, rollouts: Sequence[Rollout], step: StepContext) -> None:
        """Advantages (and what else) of a step's answers, before its first update."""

    @abstractmethod
    def learn(self, rollout: Rollout, step: StepContext) -> dict[str, float]:
        """Add the gradients of one micro-batch's share of the step's loss; its sums, `loss` by `step.count`."""

    def _collect(self, batch: Batch, step: StepContext) -> Rollout:
        assert isinstance(batch, PromptBatch)
        section = self.section
        drawn = self.sampler.draw(
            batch,
            k=section.num_generations,
            step=step,
            uniform=uniforms(
                batch.ids, k=section.num_generations, longest=self.sampler.longest, seed=self.seed, step=step.number
            ),
        )
        rows = self.policy.rows(batch, drawn)
        return Rollout(batch, rows, drawn, self.judge(self.attempts(batch, drawn)))

    def attempts(self, batch: PromptBatch, drawn: Drawn) -> list[Attempt]:
        """The drawn answers with the rows they answer."""
        k = len(drawn.tokens) // len(batch.samples)
        lengths, ended = drawn.mask.sum(1).tolist(), drawn.ended.tolist()
        return [
            Attempt(batch.samples[place // k], text, lengths[place], ended[place])
            for place, text in enumerate(self.sampler.texts(drawn))
        ]

    def before(self, rollout: Rollout, step: StepContext) -> Scored:
        """Log-probabilities (and values) of a rollout before the first update, without gradients."""
        with torch.no_grad():
            return self.policy.score(rollout.batch, rollout.rows, rollout.drawn.mask, step=step)

    def gap(self, log_probs: Tensor, drawn: Drawn) -> dict[str, float]:
        """How far the trainer's log-probabilities are from the sampler's."""
        apart = (log_probs.detach().cpu() - drawn.log_probs).abs() * drawn.mask
        return {"gap": float(apart.sum()), "gap_tokens": float(drawn.mask.sum())}

    def _watched(self, step: StepContext) -> dict[str, float]:
        """Sums of what is shown of the sampled answers."""
        sums: dict[str, float] = {}
        for rollout in self._rollouts:
            drawn, judged = rollout.drawn, rollout.judged
            found: dict[str, Any] = {
                "reward": judged.total.sum(),
                "score": judged.true.sum(),
                **{f"reward_{name}": value.sum() for name, value in judged.parts.items()},
                "entropy": drawn.entropy.sum(),
                "tokens": drawn.mask.sum(),
                "answers": len(drawn.tokens),
                "unfinished": (~drawn.ended).sum(),
                "equal_groups": equal_groups(rollout.groups(judged.total)).sum(),
                **by_source(
                    rollout.groups(judged.total).double().sum(1),
                    rollout.batch,
                    counts=torch.full((len(rollout.batch.counted),), float(rollout.k)),
                    what=self.told_by_source,
                ),
                **self._divergence(rollout, step),
            }
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def _divergence(self, rollout: Rollout, step: StepContext) -> dict[str, Tensor]:
        """KL from the model without its adapter. With a weight it is needed of all answers; for the watch the first
        answer of each question is enough (k times cheaper, and without bias)."""
        batch, rows, drawn = rollout.batch, rollout.rows, rollout.drawn
        if not self.section.kl_coef:
            every = torch.ones(len(batch.rows), dtype=torch.bool)
            batch, drawn = part_of(batch, drawn, every, k=1, pad_token_id=self.policy.pad_token_id)
            rows = self.policy.rows(batch, drawn)
        reference = self.policy.reference(batch, rows, drawn.mask, step=step)
        if reference is None:
            return {}
        if self.section.kl_coef:
            rollout.reference = reference
        return {"kl": (k3(drawn.log_probs, reference.cpu()) * drawn.mask).sum(), "kl_tokens": drawn.mask.sum()}

    def _check_agreement(self, step: StepContext) -> None:
        """Compare sampler and trainer on all answers of the first step of this process. Raises BackboneError."""
        largest, total, tokens = 0.0, 0.0, 0.0
        for rollout in self._rollouts:
            found = self.before(rollout, step).log_probs.cpu()
            apart = (found - rollout.drawn.log_probs).abs() * rollout.drawn.mask
            largest = max(largest, float(apart.max()))
            total, tokens = total + float(apart.sum()), tokens + float(rollout.drawn.mask.sum())
        kind = computed_in(self.policy.model, step)
        most, usual = GAPS[kind]
        mean = total / max(tokens, 1.0)
        self.agreement = {"largest": largest, "mean": mean, "tokens": tokens, "allowed": most, "allowed_mean": usual}
        if not (largest <= most and mean <= usual):
            raise BackboneError(
                f"sampler and trainer disagree: log-probabilities of the same tokens differ by up to {largest:.3g}, "
                f"{mean:.3g} on average",
                where=f"step {step.number + 1}, {int(tokens)} tokens",
                allowed=f"{most:g}, and {usual:g} on average, for products in {str(kind).removeprefix('torch.')}",
                do="try model.dtype: float32 with train.bf16: false, or another model.attn_implementation",
            )

    # -- without an update ------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Without gradients: `1 - score` of the most likely answers, summed (what is watched on held-out rows). With
        gradients: the loss of one sampling, for `mmft trace`."""
        assert isinstance(batch, PromptBatch)
        count = self.count(batch)
        step = StepContext(float(count), (0,), placer(self.policy.model), nullcontext, number=0)
        if torch.is_grad_enabled():
            rollout = self._collect(batch, step)
            self.prepare([rollout], step)
            return Loss(sum=self.share(rollout, step)[0] * count, count=count)
        drawn = self.sampler.draw(batch, k=1, step=step)
        judged = self.judge(self.attempts(batch, drawn))
        logs = {"reward": judged.total.sum(), "score": judged.true.sum(), "answers": torch.tensor(float(count))}
        return Loss(sum=(1.0 - judged.true).sum(), count=count, logs=logs)

    @abstractmethod
    def share(self, rollout: Rollout, step: StepContext) -> tuple[Tensor, dict[str, float]]:
        """One micro-batch's share of the step's loss, with a graph, and sums to log."""


def computed_in(model: nn.Module, step: StepContext) -> torch.dtype:
    """The type that products are computed in: autocast's, or that of the weights if it is coarser."""
    device = next(model.parameters()).device.type
    with step.autocast():
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    kinds = {value.dtype for value in model.parameters() if value.is_floating_point()}
    return next((kind for kind in (torch.bfloat16, torch.float16) if kind in kinds), torch.float32)


def placer(model: nn.Module) -> Any:
    """Moves a batch to the model's device and its pictures to the type of its first floating weights."""
    weight = next(value for value in model.parameters() if value.is_floating_point())

    def place(batch: Batch) -> Batch:
        tensors = {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
        cast = {name: value.to(weight.dtype) for name, value in tensors.items() if value.is_floating_point()}
        return replace(batch, inputs={**batch.inputs, **cast}).to(weight.device)

    return place


def over_ranks(values: Sequence[float], step: StepContext) -> list[float]:
    """Sums over all ranks."""
    if step.world == 1:
        return [float(value) for value in values]
    found = torch.tensor(values, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        found = found.cuda()
    dist.all_reduce(found)
    return found.tolist()
