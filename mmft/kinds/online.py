"""Runs in which the model samples answers itself and learns from their rewards: grpo, rloo, ppo."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mmft.adapters.build import Adapted, ParamGroup
from mmft.backbones.load import Backbone
from mmft.data.loader import RowRenderer
from mmft.data.prompts import PromptRenderer
from mmft.data.sample import Sample
from mmft.evaluation.rewards import Reward, WeightedRewards, by_metric, find_reward, one_by_one
from mmft.journal import METRICS, read_jsonl
from mmft.kinds.base import Datasets
from mmft.kinds.chat import Chat, make_renderer
from mmft.objectives.base import Objective
from mmft.objectives.build import output_head
from mmft.objectives.online.grpo import GroupObjective
from mmft.objectives.online.policy import Policy, ValueHead
from mmft.objectives.online.ppo import PpoObjective
from mmft.objectives.online.sampling import Sampler, runs_tower_once
from mmft.recipe.objective.online import REWARD_METRICS
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder

VALUE_HEAD = "value_head"
VALUE_FILE = "value_head.safetensors"
WATCHED = ("reward", "score", "kl", "entropy", "answer_tokens", "unfinished", "equal_groups", "clipped")


@dataclass(frozen=True)
class Valued(Adapted):
    """An adapted model with a value head beside it: trained and kept with it, no part of the exported model."""

    value_head: ValueHead

    def trainable(self) -> dict[str, nn.Parameter]:
        """Adapter and value head."""
        own = {f"{VALUE_HEAD}.{name}": value for name, value in self.value_head.named_parameters()}
        return dict(sorted((super().trainable() | own).items()))

    def table(self) -> list[list[str]]:
        """The adapter's rows, then the value head's."""
        plain = Adapted(self.model, self.backbone, self.targets, self.method, self.groups)
        count = sum(value.numel() for value in self.value_head.parameters())
        return [*plain.table(), ["head", "value", "full", "1", f"{count:,}"]]

    def home(self, name: str) -> tuple[str, str]:
        """(part, sub-part) of a parameter."""
        return ("head", "value") if name.startswith(f"{VALUE_HEAD}.") else super().home(name)


class Online(Chat):
    """Conversations without their last answer, which is the reference that rewards compare with."""

    objectives = ("grpo", "rloo", "ppo")
    rows_wanted = "messages, llava or qa rows: all before the last answer is the question"

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`PromptRenderer`."""
        inner = make_renderer(recipe, processor)
        pad = inner.tokenizer.pad_token_id
        return PromptRenderer(inner, pad_token_id=inner.tokenizer.eos_token_id if pad is None else pad)

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """PPO: a value head on the last hidden states."""
        if recipe.objective.name != "ppo":
            return adapted
        model = adapted.backbone.model
        head = ValueHead(model.config.get_text_config().hidden_size).to(next(model.parameters()).device)
        group = ParamGroup("head", tuple(f"{VALUE_HEAD}.{name}" for name, _ in head.named_parameters()), None)
        return Valued(adapted.model, adapted.backbone, adapted.targets, adapted.method, (*adapted.groups, group), head)

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Sampler, policy and rewards, put together."""
        section, longest = recipe.objective, recipe.evaluate.max_new_tokens
        processor = adapted.backbone.processor
        policy = Policy(
            adapted.model,
            head=output_head(adapted.model, where=f"objective.name: {section.name}"),
            pad_token_id=adapted.backbone.pad_token_id,
            temperature=section.temperature,
            value_head=adapted.value_head if isinstance(adapted, Valued) else None,
        )
        sampler = Sampler(
            adapted.model,
            processor,
            longest=longest,
            temperature=section.temperature,
        )
        device = next(adapted.model.parameters()).device
        kind = PpoObjective if section.name == "ppo" else GroupObjective
        return kind(
            policy,
            sampler,
            make_judge(recipe, datasets.rewards, device=device),
            section=section,
            seed=recipe.train.seed,
        )

    def calibration(self, recipe: Recipe, backbone: Any, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Rows with their answers."""
        return super().calibration(recipe, backbone, _plain(datasets))

    def keep(self, recipe: Recipe, adapted: Adapted, folder: Path) -> None:
        """The value head, in a file of its own that a merge does not read."""
        if isinstance(adapted, Valued):
            tensors = {name: value.detach().cpu().clone() for name, value in adapted.value_head.named_parameters()}
            save_file(tensors, folder / VALUE_FILE, metadata={"format": "pt"})

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Rows with their answers, as in a run of conversations."""
        return super().proof_rows(run, adapted, _plain(datasets))

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Most likely answers of every model, as in a run of conversations."""
        super().evaluate(run, adapted, _plain(datasets))

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """The recipe's metrics over the predictions, and what the loop looked like at its start and end."""
        found = super().scores(run)
        watch = watched(run)
        return {**found, "online": watch} if watch else found

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Tokens of rows with their own answers."""
        assert isinstance(renderer, PromptRenderer)
        return super().measure(renderer.inner, samples)

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """All answers to a forward's questions are learned from at once, each as long as they may be; their logits are
        whole. A question's picture is encoded once where the family can."""
        k, longest = recipe.objective.num_generations, recipe.evaluate.max_new_tokens
        micro = recipe.train.per_device_train_batch_size
        found = lengths or {"all": [512], "supervised": [64]}
        pixels = found.get("pixels", [0] * len(found["all"]))
        questions = [every - own for every, own in zip(found["all"], found["supervised"], strict=True)]
        once = runs_tower_once(backbone.model)
        drawn = {
            "all": [length + longest for length in questions for _ in range(k)],
            "supervised": [longest for _ in questions for _ in range(k)],
            "pixels": [seen if one == 0 or not once else 0 for seen in pixels for one in range(k)],
        }
        train = recipe.train.model_copy(update={"per_device_train_batch_size": micro * k})
        wider = recipe.model_copy(update={"train": train})
        parts = super().memory(wider, backbone, trainable=trainable, lengths=drawn)
        rows = micro * k * longest
        return parts and {**parts, "logits": 12 * rows * backbone.model.config.get_text_config().vocab_size}


def _plain(datasets: Datasets) -> Datasets:
    """The same rows, rendered with their answers."""
    assert isinstance(datasets.renderer, PromptRenderer)
    return dataclasses.replace(datasets, renderer=datasets.renderer.inner)


def make_judge(recipe: Recipe, own: Mapping[str, Reward], *, device: Any = "cpu") -> WeightedRewards:
    """The rewards of the recipe, or functions of the user's own in their place. The score that they stand for is the
    first of `evaluate.metrics` that speaks of one answer (else exact match)."""
    longest = recipe.evaluate.max_new_tokens
    terms = {name: (1.0, one_by_one(reward)) for name, reward in own.items()} or {
        name: (weight, find_reward(name, longest=longest, device=device))
        for name, weight in recipe.objective.rewards.items()
    }
    true = next((name for name in recipe.evaluate.metrics if name in REWARD_METRICS), "exact_match")
    return WeightedRewards(terms, true=by_metric(true))


def watched(run: RunFolder) -> dict[str, Any]:
    """First and last tenth of the logged steps, means of each thing watched; the sampler's agreement."""
    path = run.path / METRICS
    rows = [row for row in read_jsonl(path) if "reward" in row] if path.is_file() else []
    if not rows:
        return {}
    tenth = max(1, len(rows) // 10)
    found: dict[str, Any] = {}
    for name in WATCHED:
        ends = [
            [row[name] for row in part if isinstance(row.get(name), float)] for part in (rows[:tenth], rows[-tenth:])
        ]
        if all(ends):
            found[name] = {"first": sum(ends[0]) / len(ends[0]), "last": sum(ends[1]) / len(ends[1])}
    found["sampler_gap"] = {
        "largest_at_start": max(row.get("first_sampler_gap", 0.0) for row in rows),
        "mean": sum(row.get("sampler_gap", 0.0) for row in rows) / len(rows),
    }
    return found
