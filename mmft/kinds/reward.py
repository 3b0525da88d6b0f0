"""Runs that learn a number for an answer: adapters and a scalar head, kept as an adapter and as a classifier of
transformers."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmft.adapters.build import Adapted, ParamGroup
from mmft.backbones.load import Backbone
from mmft.backbones.reward_model import load_reward_model, write_reward_model
from mmft.data.loader import RowRenderer
from mmft.data.preference import PREFERENCE, as_pairs
from mmft.data.preference_render import PreferenceBatch
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.errors import DataError, ExportError
from mmft.evaluation.preference import answer_values
from mmft.evaluation.reward import Judged, score_rewards
from mmft.files import atomic_folder, write_json
from mmft.kinds.base import Datasets, Kind, models
from mmft.kinds.chat import Chat
from mmft.kinds.preference import (
    Preference,
    answers_renderer,
    only_one,
    preference_renderer,
    require_candidates,
    rows_to_try,
)
from mmft.objectives.base import Objective
from mmft.objectives.build import output_head, virtual_tokens
from mmft.objectives.preference_forward import answer_logps, share_where_exact
from mmft.objectives.reference import placed
from mmft.objectives.reward import HEAD, RewardObjective, answer_rewards, make_head
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder, read_json

RESULT = "rewards.json"
FILE = "reward_head.safetensors"
FOLDER = "reward_model"
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""What the written model's rewards may be off by, as a share of the largest (at least of 1)."""


class Reward(Kind):
    """`reward`: pairs and rankings of answers."""

    objectives = ("reward",)
    formats = (PREFERENCE,)
    rows_wanted = "preferences: chosen and rejected, or answers with scores or a ranking"

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`answers_renderer`."""
        return answers_renderer(recipe, processor)

    def streamed(self, recipe: Recipe, rows: Callable[[int], Sample], number: int, count: int) -> Sample:
        """A ranking, or one with ties that is one pair."""
        sample = rows(number)
        require_candidates([sample], recipe, what="data.train")
        made = self.samples(recipe, [sample])
        return only_one(sample, made, "ranking", "answers that are not scored alike")

    def samples(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """Rankings as they are; those with ties as pairs without them."""
        found: list[Sample] = []
        for sample in samples:
            if len(sample.candidates) < 2:
                raise DataError(
                    "the row has one answer, and objective.name is reward",
                    where=sample.where or sample.id,
                    allowed="two answers or more",
                    do="set objective.name: kto for thumbs",
                )
            scores = [one.score for one in sample.candidates if one.score is not None]
            found += as_pairs(sample) if len(set(scores)) < len(scores) else [sample]
        return found

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """The adapted model with a head that is trained too."""
        head = make_head(adapted.backbone.model.config.get_text_config().hidden_size)
        adapted.model.add_module(HEAD, head.to(next(adapted.model.parameters()).device))
        names = tuple(f"{HEAD}.{name}" for name, _ in head.named_parameters())
        return dataclasses.replace(adapted, groups=(*adapted.groups, ParamGroup("head", names, None)))

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Bradley-Terry and Plackett-Luce; the prompt is shared where that is exact."""
        streamed = isinstance(datasets.train, Streamed)
        for name, samples in {**({} if streamed else {"data.train": datasets.train}), **datasets.evals}.items():
            require_candidates(samples, recipe, what=name)
        vocabulary, ahead = output_head(adapted.model, where="objective.name"), virtual_tokens(adapted.model)
        objective = RewardObjective(
            vocabulary=vocabulary,
            head=getattr(adapted.model, HEAD),
            margin=recipe.objective.margin,
            centre_weight=recipe.objective.centre_weight,
            answer_weight=recipe.objective.answer_weight,
            ahead=ahead,
        )
        renderer, device = preference_renderer(datasets), next(adapted.model.parameters()).device

        def seen(batch: PreferenceBatch) -> torch.Tensor:
            # The head starts at zero, so the layout is judged by what the vocabulary head sees.
            here = placed(batch, adapted.backbone.model.dtype, device)
            return answer_logps(adapted.model, vocabulary, here, tokens=True)

        renderer.share = False
        if not ahead:
            share_where_exact(adapted.model, renderer, rows_to_try(datasets), run=seen)
        return objective

    def keep(self, recipe: Recipe, adapted: Adapted, folder: Path) -> None:
        """The head, beside the adapter."""
        head: Any = getattr(adapted.model, HEAD)
        save_file({"weight": head.weight.detach().cpu().clone()}, folder / FILE, metadata={"format": "pt"})

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """As of a run on pairs: the merge itself is proved by token scores."""
        return Preference().proof_rows(run, adapted, datasets)

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """Write `reward_model/`, read it back with transformers alone, and compare its rewards with the adapter's."""
        samples = datasets.shown(run.recipe.export.verify_rows)
        head, folder = reward_head(run, adapted), run.path / FOLDER
        with atomic_folder(folder, replace=True) as made:
            write_reward_model(run.merged, head.weight.detach().cpu(), adapted.backbone.processor, made)
        if not samples:
            return {"reward_model": {"folder": str(folder), "rows": 0}}
        renderer = preference_renderer(datasets)
        share, renderer.share = renderer.share, False
        batch = renderer.assemble([(sample, 0) for sample in samples])
        renderer.share = share
        model: Any = load_reward_model(folder, dtype="auto").eval()
        here = placed(batch, adapted.backbone.model.dtype, next(adapted.model.parameters()).device)
        pad = model.config.get_text_config().pad_token_id
        inputs = placed(batch, model.dtype, torch.device("cpu")).inputs
        ids = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], pad)
        adapted.model.eval()
        with torch.no_grad():
            ours = answer_rewards(adapted.model, output_head(adapted.model, where="reward"), head, here).cpu()
            theirs = model(**{**inputs, "input_ids": ids}, use_cache=False).logits[:, 0].float()
        off, dtype = float((ours - theirs).abs().max()), model.dtype
        limit = _LIMITS[dtype] * max(1.0, float(ours.abs().max()))
        del model
        gc.collect()
        checked = not adapted.backbone.quantized or run.recipe.export.merge_onto == "dequantized"
        if checked and not off <= limit:
            raise ExportError(
                f"the written reward model differs from the trained one by {off:.3g} (allowed {limit:.3g})",
                where=str(folder),
                do="look at merge_report.json, and at the tokenizer's padding and end tokens",
            )
        found = {"folder": str(folder), "rows": len(samples), "max_difference": off, "limit": limit}
        return {"reward_model": {**found, "checked": checked}}

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Rewards of all answers, written with their scores to `rewards.json`; of the base, which has no head, the
        mean log-probability of the answer's tokens."""
        head, renderer = reward_head(run, adapted), preference_renderer(datasets)
        found: dict[str, dict[str, Judged]] = {}
        total = sum(map(len, datasets.evals.values()))
        for which, model, backbone in models(run, adapted, self.base(run.recipe, run.path)):
            with run.journal.progress(total, f"rewards of {which}") as bar:
                found[which] = {
                    name: _judge(run, which, model, backbone, head, samples=samples, renderer=renderer, bar=bar)
                    for name, samples in datasets.evals.items()
                }
        tags = {name: [one.tags for one in samples] for name, samples in datasets.evals.items()}
        recipe = run.recipe
        values = score_rewards(
            found,
            tags,
            group_by=recipe.evaluate.group_by,
            bootstrap_samples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )
        write_json(run.path / RESULT, values)

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """What `evaluate` wrote; empty before that."""
        return read_json(run.path / RESULT)

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """As of a run on pairs."""
        return Preference().measure(renderer, samples)

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """Activations as for two conversations a row; scores of one token an answer with `answer_weight`."""
        seen = {"all": lengths["all"] if lengths else [512], "supervised": [int(recipe.objective.answer_weight > 0)]}
        found = Chat().memory(recipe, backbone, trainable=trainable, lengths=seen)
        return found and {name: 2 * value for name, value in found.items()}


def reward_head(run: RunFolder, adapted: Adapted) -> nn.Linear:
    """The trained head: on the model, or of a finished run from its adapter folder."""
    head = getattr(adapted.model, HEAD, None)
    if isinstance(head, nn.Linear):
        return head
    weight = load_file(run.adapter / FILE)["weight"]
    head = make_head(weight.shape[1])
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.to(next(adapted.model.parameters()).device)


def _judge(
    run: RunFolder,
    which: str,
    model: Any,
    backbone: Backbone,
    head: nn.Linear,
    *,
    samples: Sequence[Sample],
    renderer: Any,
    bar: Any,
) -> Judged:
    vocabulary, device = output_head(model, where="evaluate"), next(model.parameters()).device

    def run_one(batch: PreferenceBatch) -> torch.Tensor:
        if which == "base":
            return answer_logps(model, vocabulary, batch) / batch.lengths.to(device)
        return answer_rewards(model, vocabulary, head, batch)

    was_training = model.training
    model.eval()
    size = run.recipe.evaluate.per_device_eval_batch_size

    def place(batch: PreferenceBatch) -> PreferenceBatch:
        return placed(batch, backbone.model.dtype, device)

    rewards = answer_values(renderer, samples, run_one, batch_size=size, place=place, progress=bar.update)
    model.train(was_training)
    lengths = [[int((one.labels >= 0).sum()) for one in renderer.rendered(sample)] for sample in samples]
    return Judged(rewards, lengths)
