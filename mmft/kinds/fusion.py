"""Runs on rows of tables: encoders of several modalities are fused into one classifier or regressor.

The base is composed of `model.encoders` (`fusion_base`), or a fusion model's folder. Tokens of encoders that nothing
trains are computed once for each row and kept in the cache, named by what they are made of.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted, ParamGroup, base_name
from mmft.backbones.load import load_backbone, read_config
from mmft.data.formats import load_many
from mmft.data.fused import FusedRenderer
from mmft.data.loader import RowRenderer
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.data.table_rows import label_of
from mmft.data.tables import Columns
from mmft.errors import ExportError, RecipeError, choices
from mmft.evaluation.classes import answer_set, inner, score_sets
from mmft.files import write_json
from mmft.fusion import fit_stacking
from mmft.kinds.base import Datasets, Kind, check_formats, folder_section, models
from mmft.kinds.fusion_base import compose, known_columns
from mmft.kinds.fusion_store import stored_features
from mmft.objectives.base import Objective
from mmft.objectives.classification import ClassificationObjective
from mmft.recipe.schema import COMPOSED, ModelSection, Recipe
from mmft.runfolder import RunFolder, read_json
from mmft.seeds import fold, generator

RESULT = "classification.json"
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""What a merged model's output may be off by, in shares of the largest output: its type's rounding."""
STACKING = "late_stacking"
_STACKED = 5
"""One training row in so many is kept from the heads, to fit the stacking layer on."""


class Fusion(Kind):
    """`classification`: labels of rows with pictures, texts, sounds, videos and columns of a table."""

    objectives = ("classification",)
    formats = ("table",)
    rows_wanted = "rows of a table with a label column for classification"

    def base(self, recipe: Recipe, folder: Path) -> ModelSection:
        """The composed model below `folder`, or the recipe's own where it names a fusion model."""
        return (
            compose(recipe, folder, _training_rows(self, recipe))
            if recipe.model.name_or_path == COMPOSED
            else recipe.model
        )

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`FusedRenderer` with the labels that the base declares."""
        return FusedRenderer(
            processor,
            max_length=recipe.data.max_length,
            over_length=recipe.data.over_length,
            max_image_pixels=recipe.data.max_image_pixels,
        )

    def columns(self, recipe: Recipe, rows: Sequence[Mapping[str, Any]], declared: Mapping[str, str]) -> Columns:
        """Of a streamed table: as the model of the recipe knows them, the label as declared or called so; what it does
        not know is ignored."""
        return known_columns(read_config(recipe.model), rows, declared)

    def balanced(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """Without the rows that stacking is fitted on; of smaller classes all rows again and again, the last time some
        of them by the seed, until every class is of the size of the largest."""
        kept = [sample for sample in samples if not _for_stacking(recipe, sample)]
        return oversampled(kept, seed=recipe.train.seed) if recipe.objective.balance == "sampling" else kept

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """Modalities with a learning rate of their own in groups of their own."""
        return with_rates(adapted, recipe.objective.modality_learning_rates)

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """The model's own loss; every label is looked at, and frozen features are computed, before the first step."""
        made = ClassificationObjective(adapted.model)
        renderer = _renderer(datasets)
        streamed = isinstance(datasets.train, Streamed)
        for samples in (*([] if streamed else [datasets.train]), *datasets.evals.values()):
            renderer.targets(samples)
        if not streamed:
            stored_features(recipe, adapted, datasets, renderer)
        return made

    def settle(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> None:
        """Fit the stacking layer on the rows that were kept from the heads."""
        if recipe.objective.strategy != STACKING:
            return
        renderer = _renderer(datasets)
        samples = [sample for sample in _training_rows(self, recipe) if _for_stacking(recipe, sample)]
        store = renderer.store
        if not all((sample.source, sample.id) in renderer.places for sample in samples):
            renderer.store = None
        fusion, found = inner(adapted.model), []
        adapted.model.eval()
        with torch.no_grad():
            size = recipe.evaluate.per_device_eval_batch_size
            for start in range(0, len(samples), size):
                batch = renderer.place(renderer.inputs(samples[start : start + size]), fusion)
                found.append(adapted.model(**batch).modality_logits)
        fit_stacking(fusion.modality_head, fusion.config, torch.cat(found), labels=renderer.targets(samples))
        renderer.store = store

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """The outputs of the merged folder and of the adapter model on a few rows."""
        chosen = datasets.shown(run.recipe.export.verify_rows)
        return {"classification": compare_outputs(run, adapted, chosen, _renderer(datasets))} if chosen else {}

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Answers, metrics and the worth of each modality, of every model on every set; `classification.json`."""
        recipe, renderer = run.recipe, _renderer(datasets)
        # What autocast computed in training is not what the encoders say here.
        exact = not recipe.train.bf16 and not isinstance(datasets.train, Streamed)
        if exact:
            stored_features(recipe, adapted, datasets, renderer)
        store, found = renderer.store, {}
        total = sum(map(len, datasets.evals.values()))
        for which, model, _ in models(run, adapted, self.base(recipe, run.path)):
            same = exact and (which != "merged" or _keeps_encoders(recipe, adapted))
            renderer.store = store if same else None
            with run.journal.progress(total, f"answers of {which}") as bar:
                found[which] = {
                    name: answer_set(
                        model,
                        renderer,
                        samples,
                        batch_size=recipe.evaluate.per_device_eval_batch_size,
                        resamples=recipe.evaluate.bootstrap_samples,
                        seed=fold(recipe.train.seed, "worth", name),
                        progress=bar.update,
                    )
                    for name, samples in datasets.evals.items()
                }
        renderer.store = store
        config = inner(adapted.model).config
        scored = score_sets(
            found,
            datasets.evals,
            renderer,
            config,
            group_by=recipe.evaluate.group_by,
            resamples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )
        write_json(run.path / RESULT, scored)

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """What `evaluate` wrote; empty before that."""
        return read_json(run.path / RESULT)

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Tokens of each row's longest text."""
        return {"all": [renderer.length(sample) for sample in samples]}


def _renderer(datasets: Datasets) -> FusedRenderer:
    assert isinstance(datasets.renderer, FusedRenderer)
    return datasets.renderer


def _training_rows(kind: Kind, recipe: Recipe) -> list[Sample]:
    loaded = load_many(recipe.data.train, recipe.data, recipe.train.seed, wanted=kind.formats)
    check_formats(kind, recipe, loaded)
    return [sample for one in loaded for sample in one.samples]


def _for_stacking(recipe: Recipe, sample: Sample) -> bool:
    stacked = recipe.objective.strategy == STACKING
    return stacked and fold(recipe.train.seed, "stacking", sample.source, sample.id) % _STACKED == 0


def oversampled(samples: Sequence[Sample], *, seed: int) -> list[Sample]:
    """All classes at the size of the largest: each class's rows whole as often as they fit, and a draw of the rest."""
    classes: dict[str, list[Sample]] = {}
    for sample in samples:
        classes.setdefault(label_of(sample), []).append(sample)
    most = max(map(len, classes.values()))
    out: list[Sample] = []
    for name, rows in classes.items():
        out += rows * (most // len(rows)) + generator(seed, "oversampled", name).sample(rows, most % len(rows))
    return out


def with_rates(adapted: Adapted, rates: dict[str, float]) -> Adapted:
    """What belongs to one modality (its encoder's adapters, projection, pooling and own head) in a group of its own
    with the rate given for it. Raises RecipeError for an unknown modality and one of which nothing is trained."""
    names = inner(adapted.model).config.modalities
    for name in rates:
        if name not in names:
            raise RecipeError(
                f"no modality is called '{name}'",
                where=f"objective.modality_learning_rates: {name}",
                allowed=choices(names, word=name),
                do="name a column, or 'table'",
            )
    homes = {
        name: (f"encoders.{name}.", f"projections.{name}.", f"pools.{name}.", f"modality_head.heads.{at}.")
        + (("tabular.",) if name == "table" else ())
        for at, name in enumerate(names)
    }

    def owner(parameter: str) -> str | None:
        plain = base_name(parameter)
        return next((name for name in rates if any(plain.startswith(home) for home in homes[name])), None)

    groups: list[ParamGroup] = []
    hit = set()
    for group in adapted.groups:
        owned: dict[str | None, list[str]] = {}
        for parameter in group.names:
            owned.setdefault(owner(parameter), []).append(parameter)
        for own, parameters in owned.items():
            rate = group.learning_rate if own is None else rates[own]
            groups.append(dataclasses.replace(group, names=tuple(parameters), learning_rate=rate))
            hit.add(own)
    if idle := sorted(set(rates) - hit):  # type: ignore[type-var]
        raise RecipeError(
            f"nothing of '{idle[0]}' is trained", where=f"objective.modality_learning_rates: {idle[0]}",
            do="train it, or take the rate out",
        )  # fmt: skip
    return dataclasses.replace(adapted, groups=tuple(groups))


def _keeps_encoders(recipe: Recipe, adapted: Adapted) -> bool:
    """Whether a frozen encoder of the merged model has the same weights as in training."""
    return not adapted.backbone.quantized and recipe.export.dtype in (None, recipe.model.dtype)


@torch.no_grad()
def compare_outputs(
    run: RunFolder, adapted: Adapted, samples: Sequence[Sample], renderer: FusedRenderer
) -> dict[str, Any]:
    """Outputs of merged and adapter model on `samples`, without stored features.

    Raises ExportError when they differ by more than the weights' type rounds (checked unless the base is quantized and
    the merge was onto the original weights).
    """
    recipe, store = run.recipe, renderer.store
    renderer.store = None
    merged = load_backbone(
        folder_section(recipe.model, run.merged), device=next(adapted.model.parameters()).device, processor=False
    )
    adapted.model.eval()
    found = renderer.inputs(samples)
    ours, theirs = (
        model(**renderer.place(found, inner(model))).logits.float() for model in (adapted.model, merged.model)
    )
    renderer.store = store
    size, difference = float(ours.abs().max()), float((ours - theirs).abs().max())
    kinds = {merged.model.dtype, inner(adapted.model).dtype}
    limit = max(_LIMITS[torch.bfloat16] if adapted.backbone.quantized else _LIMITS[kind] for kind in kinds)
    checked = not adapted.backbone.quantized or recipe.export.merge_onto == "dequantized"
    same = int((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
    del merged
    gc.collect()
    if checked and not difference <= limit * max(size, 1.0):
        raise ExportError(
            f"the merged model's outputs differ from the adapter model's by {difference:.3g} of {size:.3g}"
            f" (allowed {limit:g} of it)",
            where=str(run.merged),
            do="look at merge_report.json",
        )
    return {"rows": len(samples), "max_difference": difference, "largest": size, "same_decision": same, "limit": limit}
