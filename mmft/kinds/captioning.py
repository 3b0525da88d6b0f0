"""Runs on captions: an encoder-decoder (or a decoder that sees the picture) learns to write them, and is scored by
them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted
from mmft.backbones.classes import model_class
from mmft.backbones.load import Backbone, read_config
from mmft.backbones.roots import head_of
from mmft.data.captions import CaptionRenderer, caption_shape, decoder_config
from mmft.data.collate import Batch
from mmft.data.loader import RowRenderer, near
from mmft.data.order import epoch_order
from mmft.data.pairs import merge_pairs
from mmft.data.preview import write_preview
from mmft.data.render import IGNORED
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.engine.memory import estimate_memory
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.captions import generate_captions
from mmft.evaluation.metrics.meteor import why_not
from mmft.evaluation.sampling import sampling_of
from mmft.evaluation.scores import score_records
from mmft.export.outputs import COUNTED
from mmft.kinds.base import Datasets, Kind, models
from mmft.objectives.base import Objective
from mmft.objectives.captioning import CaptioningObjective
from mmft.recipe.schema import EvaluateSection, Recipe
from mmft.runfolder import RunFolder

METRICS = ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu", "rouge_l", "meteor")
"""What captions are scored by where the recipe names nothing; the first is the headline."""
CALIBRATION_BATCHES = 16


def caption_metrics(section: EvaluateSection) -> tuple[list[str], dict[str, str]]:
    """The metrics of a run, and those left out with the reason (METEOR needs Java)."""
    named = section.metrics != EvaluateSection.model_fields["metrics"].default
    wanted = list(section.metrics if named else METRICS)
    reason = why_not() if "meteor" in wanted else None
    if reason is None:
        return wanted, {}
    return [name for name in wanted if name != "meteor"], {"meteor": reason}


class Captioning(Kind):
    """`captioning`: rows of pairs, cross-entropy of the captions, captions by generation."""

    objectives = ("captioning",)
    formats = ("pairs",)
    rows_wanted = "pairs (image and caption) for captioning and contrastive; messages, llava or qa for sft"

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`CaptionRenderer`, by the shape of the recipe's model. Raises BackboneError for a model that cannot."""
        config = read_config(recipe.model)
        shape = caption_shape(model_class(config, name=recipe.model.name_or_path), config)
        return CaptionRenderer(
            processor,
            shape,
            max_length=recipe.data.max_length,
            over_length=recipe.data.over_length,
            max_image_pixels=recipe.data.max_image_pixels,
            captions=recipe.objective.captions_per_image,
            prompt=recipe.objective.prompt,
            seed=recipe.train.seed,
        )

    def samples(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """Rows of one picture become one."""
        return merge_pairs(samples)

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Cross-entropy of the captions with the head on supervised rows only."""
        return CaptioningObjective(
            head=head_of(adapted.backbone.model),
            shape=caption_renderer(datasets).shape,
            label_smoothing=recipe.objective.label_smoothing_factor,
        )

    def calibration(self, recipe: Recipe, backbone: Backbone, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Up to 16 training batches in the order of the seed, on the model's device."""
        rows, device = len(datasets.train), next(backbone.model.parameters()).device
        size = min(recipe.train.per_device_train_batch_size, rows)
        most, train = size * CALIBRATION_BATCHES, datasets.train
        if isinstance(train, Streamed):
            chosen = near(train, most, datasets.renderer)
        else:
            chosen = [train[row] for row in epoch_order(rows, seed=recipe.train.seed, epoch=0)[:most]]
        found = []
        for start in range(0, len(chosen) - size + 1, size):
            batch = caption_renderer(datasets).assemble([(row, 0) for row in chosen[start : start + size]])
            cast = _cast(batch, backbone.model.dtype)
            found.append({key: value.to(device) for key, value in cast.items()})
        return found

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Real evaluation rows (training rows where there are none), a batch each, compared where a caption stands."""
        samples = datasets.shown(run.recipe.export.verify_rows)
        batches = [caption_renderer(datasets).assemble([(sample, 0)]) for sample in samples]
        dtype = getattr(torch, run.recipe.model.dtype)
        return [{**_cast(batch, dtype), COUNTED: batch.labels != IGNORED} for batch in batches]

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Captions of every model for every evaluation row, written to `predictions.jsonl`."""
        evaluate, store = run.recipe.evaluate, PredictionStore()
        for name, reason in caption_metrics(evaluate)[1].items():
            run.journal.warn(f"{name} is left out: {reason}")
        total = sum(map(len, datasets.evals.values()))
        for which, model, _ in models(run, adapted, self.base(run.recipe, run.path)):
            with run.journal.progress(total, f"captions of {which}") as bar:
                for name, samples in datasets.evals.items():
                    found = generate_captions(
                        model,
                        caption_renderer(datasets),
                        samples,
                        batch_size=evaluate.per_device_eval_batch_size,
                        max_new_tokens=evaluate.max_new_tokens,
                        num_beams=evaluate.num_beams,
                        sampling=sampling_of(evaluate, run.recipe.train.seed),
                        device=next(model.parameters()).device,
                        progress=bar.update,
                    )
                    store.add(name, which, samples, answers=found, folder=run.path)
        store.write(run.predictions)

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """The metrics over the captions; `left_out` names those that could not be computed here."""
        if not run.predictions.is_file():
            return {}
        recipe, store = run.recipe, PredictionStore.read(run.predictions)
        metrics, left_out = caption_metrics(recipe.evaluate)
        found = score_records(
            store.records,
            [which for which in recipe.evaluate.models if which in store.models],
            metrics,
            group_by=recipe.evaluate.group_by,
            bootstrap_samples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )
        return {**found, "left_out": left_out} if left_out else found

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """The decoder's tokens of each row's longest caption, and those with loss."""
        assert isinstance(renderer, CaptionRenderer)
        rows = [renderer.render(sample) for sample in samples]
        return {
            "all": [renderer.length(sample) for sample in samples],
            "supervised": [int((row.labels != IGNORED).sum()) for row in rows],
        }

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """Activations of the decoder and logits, at the longest caption measured (64 tokens where none was); an encoder
        that is trained keeps its own beside them, which are not in here."""
        text = decoder_config(backbone.model.config)
        micro = recipe.train.per_device_train_batch_size * max(1, recipe.objective.captions_per_image)
        estimate = estimate_memory(
            weight_bytes=0,
            trainable_parameters=trainable,
            tokens=micro * (max(lengths["all"]) if lengths else 64),
            supervised=micro * (max(lengths["supervised"]) if lengths else 64),
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            vocabulary=text.vocab_size,
            checkpointing=recipe.train.gradient_checkpointing,
        )
        return {"activations": int(estimate.activations), "logits": int(estimate.logits)}

    def preview(self, recipe: Recipe, processor: Any, samples: Sequence[Sample], path: Path, *, rows: int) -> None:
        """Rows with the caption's tokens coloured."""
        renderer = self.renderer(recipe, processor)
        assert isinstance(renderer, CaptionRenderer)
        write_preview(samples, renderer, processor, path, rows=rows)


def caption_renderer(datasets: Datasets) -> CaptionRenderer:
    """The renderer of a run on captions."""
    assert isinstance(datasets.renderer, CaptionRenderer)
    return datasets.renderer


def _cast(batch: Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs with what is not whole numbers in the type of the weights."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()}
