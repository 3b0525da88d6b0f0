"""Runs of conversations: answers are trained, generated and scored as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from mmft.adapters.build import Adapted
from mmft.backbones.load import Backbone
from mmft.data.collate import collate
from mmft.data.loader import RowRenderer, near
from mmft.data.order import epoch_order
from mmft.data.preview import write_preview
from mmft.data.render import IGNORED, Rendered, Renderer, Supervise
from mmft.data.sample import Sample
from mmft.data.steps import plan_steps
from mmft.data.streaming import Streamed
from mmft.engine.step_memory import StepSizes, patches_of, step_memory
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.generate import generate_answers
from mmft.evaluation.sampling import sampling_of
from mmft.evaluation.scores import score_records
from mmft.fast.shown import step_lines, told
from mmft.kinds.base import Datasets, Kind, models
from mmft.objectives.base import Objective
from mmft.objectives.build import build_sft
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder

CALIBRATION_BATCHES = 16


def make_renderer(recipe: Recipe, processor: Any, *, supervise: Supervise | None = None) -> Renderer:
    """The renderer of conversations a recipe asks for. Raises DataError for a processor without a chat template."""
    data = recipe.data
    return Renderer(
        processor,
        max_length=data.max_length,
        over_length=data.over_length,
        supervise=supervise or data.supervise,
        max_image_pixels=data.max_image_pixels,
        video_frames=data.video_frames,
    )


def chat_renderer(datasets: Datasets) -> Renderer:
    """The renderer of a run of conversations."""
    assert isinstance(datasets.renderer, Renderer)
    return datasets.renderer


class Chat(Kind):
    """`sft`: rows of conversations, cross-entropy of the answers, answers by generation."""

    objectives: ClassVar[tuple[str, ...]] = ("sft",)
    formats = ("messages", "llava", "prompt", "qa")
    rows_wanted = "messages, llava or qa rows for sft; pairs (image and caption) for contrastive and captioning"

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`make_renderer`."""
        return make_renderer(recipe, processor)

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Cross-entropy with the head on supervised rows only."""
        return build_sft(recipe.objective, adapted.model)

    def calibration(self, recipe: Recipe, backbone: Backbone, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Up to 16 training batches in the order of the seed, on the model's device."""
        rows, device, dtype = len(datasets.train), next(backbone.model.parameters()).device, backbone.model.dtype
        size = min(recipe.train.per_device_train_batch_size, rows)
        most, train, renderer = size * CALIBRATION_BATCHES, datasets.train, chat_renderer(datasets)
        if isinstance(train, Streamed):
            chosen = near(train, most, renderer)
        else:
            chosen = [train[row] for row in epoch_order(rows, seed=recipe.train.seed, epoch=0)[:most]]
        found = []
        for start in range(0, len(chosen) - size + 1, size):
            rendered = [renderer.render(sample) for sample in chosen[start : start + size]]
            inputs = collate(rendered, pad_token_id=backbone.pad_token_id).inputs
            cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
            found.append({key: value.to(device) for key, value in cast.items()})
        return found

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Real evaluation rows (training rows where there are none), a batch each."""
        samples = datasets.shown(run.recipe.export.verify_rows)
        dtype = getattr(torch, run.recipe.model.dtype)
        rows = []
        for sample in samples:
            batch = collate([chat_renderer(datasets).render(sample)], pad_token_id=adapted.backbone.pad_token_id)
            inputs = {
                key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()
            }
            rows.append({**inputs, "labels": batch.labels})
        return rows

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Answers of every model to every evaluation row, written to `predictions.jsonl`."""
        store = PredictionStore()
        for which, model, backbone in models(run, adapted, self.base(run.recipe, run.path)):
            _answer_all(run, store, which, model, backbone, datasets)
        store.write(run.predictions)

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """The recipe's metrics over the predictions."""
        if not run.predictions.is_file():
            return {}
        recipe, store = run.recipe, PredictionStore.read(run.predictions)
        return score_records(
            store.records,
            [which for which in recipe.evaluate.models if which in store.models],
            recipe.evaluate.metrics,
            group_by=recipe.evaluate.group_by,
            bootstrap_samples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Tokens, those of pictures and the supervised ones of rendered rows; `pixels`: values that go to the tower."""
        assert isinstance(renderer, Renderer)
        rows = [renderer.render(sample) for sample in samples]
        return {
            "all": [len(row.input_ids) for row in rows],
            "image": [row.media_tokens for row in rows],
            "supervised": [int((row.labels[1:] != IGNORED).sum()) for row in rows],
            "pixels": [_pixels(row) for row in rows],
        }

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """Activations of the language model and logits, at the longest row measured (512 tokens where none was)."""
        micro, config = recipe.train.per_device_train_batch_size, backbone.model.config
        found = lengths or {"all": [512], "supervised": [64]}
        pixels = found.get("pixels", [0] * len(found["all"]))
        groups = [
            StepSizes(
                tuple((list(found["all"][at : at + micro]) * micro)[:micro]),
                sum((list(found["supervised"][at : at + micro]) * micro)[:micro]),
                patches_of(config, sum((list(pixels[at : at + micro]) * micro)[:micro])),
            )
            for at in range(0, len(found["all"]), micro)
        ]
        layers = config.get_text_config().num_hidden_layers
        step = step_memory(
            config,
            max(groups, key=lambda sizes: sum(sizes.rows)),
            fast=recipe.train.fast is True and recipe.adapter.method == "lora",
            recomputed=layers if recipe.train.gradient_checkpointing else 0,
            towers="vision" in {target.split(".")[0] for target in recipe.adapter.targets},
            width=4 if recipe.model.dtype == "float32" and not recipe.train.bf16 else 2,
        )
        return {"activations": step.activations, "logits": step.logits, "vision": step.vision}

    def preview(self, recipe: Recipe, processor: Any, samples: Sequence[Sample], path: Path, *, rows: int) -> None:
        """Rows with the trained tokens coloured, and the packs of the first step."""
        renderer = make_renderer(recipe, processor)
        lines = step_lines(recipe, renderer, samples, plan_steps(recipe, samples, 1)[0])
        write_preview(samples, renderer, processor, path, rows=rows, lines=[told(line) for line in lines])


def _pixels(row: Rendered) -> int:
    """Pixel values of a row, in it or beside it."""
    given = [row.media, *([row.pictures.inputs] if row.pictures is not None else [])]
    return sum(value.numel() for one in given for name, value in one.items() if name.startswith("pixel_values"))


def _answer_all(
    run: RunFolder, store: PredictionStore, which: str, model: Any, backbone: Backbone, datasets: Datasets
) -> None:
    evaluate = run.recipe.evaluate
    total = sum(len(samples) for samples in datasets.evals.values())
    with run.journal.progress(total, f"answers of {which}") as bar:
        for name, samples in datasets.evals.items():
            answers = generate_answers(
                model,
                backbone.processor,
                chat_renderer(datasets),
                samples,
                batch_size=evaluate.per_device_eval_batch_size,
                max_new_tokens=evaluate.max_new_tokens,
                num_beams=evaluate.num_beams,
                sampling=sampling_of(evaluate, run.recipe.train.seed),
                device=next(model.parameters()).device,
                progress=bar.update,
            )
            store.add(name, which, samples, answers=answers, folder=run.path)
