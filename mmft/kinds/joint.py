"""Runs on pairs whose model embeds, matches and writes: joint heads, and dual learning.

A dual encoder as the base is given a decoder and a matching head first (`backbones.joint.compose_joint`), in `base/` of
the run folder; a model that has the heads is taken as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted
from mmft.backbones.joint import compose_joint
from mmft.backbones.load import load_backbone, read_config
from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.errors import BackboneError, ExportError
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.joint import JointFound, add_scores, look_at_pairs, score_joint
from mmft.evaluation.scores import score_records
from mmft.files import scratch_folder, write_json
from mmft.kinds.base import Datasets, folder_section, models, wait_for_rank_0
from mmft.kinds.pairs import LIMITS, RESULT, Pairs
from mmft.objectives.base import Objective
from mmft.objectives.dual import DualObjective
from mmft.objectives.joint import JointObjective
from mmft.objectives.joint_heads import heads_of
from mmft.recipe.objective.joint import weights_of
from mmft.recipe.schema import EvaluateSection, ModelSection, Recipe
from mmft.runfolder import RunFolder, read_json

CAPTION_METRICS = ("cider", "bleu", "rouge_l")
"""How captions are scored where the recipe names no metric."""
_WHOLE = ("JointModel", "BlipJointModel", "BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval")


class Joint(Pairs):
    """`joint`: contrastive, matching and captioning terms together."""

    objectives = ("joint",)
    rows_wanted = "pairs (image and caption)"

    def base(self, recipe: Recipe, folder: Path) -> ModelSection:
        """The model, or what is composed of it and a decoder, at its own precision."""
        made = folder / "base"
        if (made / "config.json").is_file():
            return folder_section(recipe.model, made)
        try:
            architectures = getattr(read_config(recipe.model), "architectures", None) or ()
        except BackboneError:  # whoever loads the model says so; a plan goes on without its files
            return recipe.model
        if set(architectures) & set(_WHOLE):
            return recipe.model
        wait_for_rank_0(lambda: (made / "config.json").is_file(), lambda: self._compose(recipe, made), where=made)
        return folder_section(recipe.model, made)

    def _compose(self, recipe: Recipe, made: Path) -> None:
        dual = load_backbone(recipe.model.model_copy(update={"dtype": "float32"}))
        made.parent.mkdir(parents=True, exist_ok=True)
        layers, seed = recipe.objective.decoder_layers, recipe.train.seed
        with scratch_folder(made.parent, made.name) as scratch:
            compose_joint(dual.model, dual.processor, scratch, layers=layers, seed=seed)
            scratch.replace(made)

    def terms(self, recipe: Recipe) -> list[str]:
        """Heads that are used, and so scored."""
        return [
            name for name, weight in weights_of(recipe.objective.name, recipe.objective.joint_weights).items() if weight
        ]

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """The weighted sum of the terms."""
        section = recipe.objective
        return JointObjective(
            adapted.model,
            weights=weights_of(section.name, section.joint_weights),
            kind=section.loss,
            seed=recipe.train.seed,
        )

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """What every head says of a few rows."""
        chosen = datasets.shown(run.recipe.export.verify_rows)
        assert isinstance(datasets.renderer, PairRenderer)
        return {"heads": self._compared(run, adapted, chosen, datasets.renderer)} if chosen else {}

    def _compared(
        self, run: RunFolder, adapted: Adapted, samples: Sequence[Sample], renderer: PairRenderer
    ) -> dict[str, Any]:
        recipe = run.recipe
        base = self.base(recipe, run.path)
        other = load_backbone(folder_section(base, run.merged), device=next(adapted.model.parameters()).device)
        ours, theirs = (_said(model, renderer, samples) for model in (adapted.model, other.model))
        # Logits and tokens are of any size, so they are compared by their own.
        found = {
            name: float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max().clamp(min=1.0))
            for name in ours
        }
        limit = max(LIMITS[kind] for kind in {other.model.dtype, getattr(torch, recipe.export.dtype or "float32")})
        limit = LIMITS[torch.bfloat16] if adapted.backbone.quantized else limit
        checked = not adapted.backbone.quantized or recipe.export.merge_onto == "dequantized"
        del other
        gc.collect()
        worst = max(found.values())
        if checked and not worst <= limit:
            raise ExportError(
                f"the merged model's heads differ from the adapter model's by {worst:.3g} (allowed {limit:g})",
                where=str(run.merged),
                do="look at merge_report.json",
            )
        return {"rows": len(samples), "max_difference": worst, "by_head": found, "limit": limit, "checked": checked}

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Retrieval, plain and re-ranked, and captions of every model on every set: `retrieval.json` and, where the
        model writes, `predictions.jsonl`."""
        assert isinstance(datasets.renderer, PairRenderer)
        recipe, store, found = run.recipe, PredictionStore(), {}
        total = sum(map(len, datasets.evals.values()))
        for which, model, _ in models(run, adapted, self.base(recipe, run.path)):
            with run.journal.progress(total, f"pairs of {which}") as bar:
                found[which] = {
                    name: look_at_pairs(
                        model,
                        datasets.renderer,
                        samples,
                        terms=self.terms(recipe),
                        batch_size=recipe.evaluate.per_device_eval_batch_size,
                        options=_writing(recipe.evaluate),
                        progress=bar.update,
                    )
                    for name, samples in datasets.evals.items()
                }
            for name, samples in datasets.evals.items():
                if (captions := found[which][name].captions) is not None:
                    store.add(name, which, samples, answers=captions, folder=run.path)
        if store.records:
            store.write(run.predictions)
        write_json(run.path / RESULT, _scored(recipe, found, store))

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """What `evaluate` wrote; empty before that."""
        return read_json(run.path / RESULT)


class Dual(Joint):
    """`dual`: picture to text and text to picture, tied by a consistency term."""

    objectives = ("dual",)

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Both directions and what ties them."""
        section = recipe.objective
        return DualObjective(
            adapted.model,
            weights={**weights_of(section.name, section.joint_weights), "consistency": section.consistency_weight},
            form=section.consistency,
            kind=section.loss,
            seed=recipe.train.seed,
        )

    def terms(self, recipe: Recipe) -> list[str]:
        """Both directions are scored, whatever they weigh."""
        return ["contrastive", "caption"]


def _writing(section: EvaluateSection) -> dict[str, Any]:
    return {"max_new_tokens": section.max_new_tokens, "num_beams": section.num_beams, "do_sample": False}


def _scored(recipe: Recipe, found: dict[str, dict[str, JointFound]], store: PredictionStore) -> dict[str, Any]:
    section, seed = recipe.evaluate, recipe.train.seed
    whole = score_joint(found, bootstrap_samples=section.bootstrap_samples, seed=seed)
    if store.records:
        told = section.metrics != EvaluateSection.model_fields["metrics"].default
        names = section.metrics if told else CAPTION_METRICS
        written = score_records(
            store.records, list(found), names, bootstrap_samples=section.bootstrap_samples, seed=seed
        )
        for name, values in written["sets"].items():
            add_scores(whole["sets"][name], values, rename=lambda score: score)
    return whole


@torch.no_grad()
def _said(model: Any, renderer: PairRenderer, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What the heads say of some rows, in float32 on the CPU."""
    heads, first, was_training = heads_of(model), next(model.parameters()), model.training
    model.eval()
    batch = renderer.assemble([(sample, 0) for sample in samples]).to(first.device)
    dtype = getattr(model, "dtype", first.dtype)
    seen = heads.see(batch.inputs["pixel_values"].to(dtype))
    ids = batch.inputs["input_ids"]
    mask = batch.inputs.get("attention_mask", torch.ones_like(ids))
    rows = torch.arange(len(ids), device=ids.device) % len(seen.tokens)
    found = {"image": seen.embeds, "text": heads.read(ids, mask), "match": heads.match(seen.tokens[rows], ids, mask)}
    if "caption" in heads.terms:
        found["caption"] = heads.write(seen.tokens[rows], ids, mask) * mask[..., None]
    model.train(was_training)
    return {name: value.float().cpu() for name, value in found.items()}
