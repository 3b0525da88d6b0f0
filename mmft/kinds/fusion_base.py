"""The base of a fusion run: pretrained encoders, statistics of the training rows, a seeded head, written as one model.

`base/` of the run folder holds it as `FusionModel.save_pretrained` does, with its processor and `composed.json`, which
says what it was made of: a resumed or finished run finds the same base again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.backbones.load import load_backbone
from mmft.data.audit import fingerprint
from mmft.data.fused import NONE
from mmft.data.sample import Sample
from mmft.data.table_rows import columns_of, label_of, sample_classes
from mmft.data.tables import TABLE, Columns, as_float, infer_columns, modality_name
from mmft.errors import BackboneError, DataError, RecipeError, choices
from mmft.files import atomic_folder, read_json_file, sha256_bytes, to_json, write_json
from mmft.fusion import FusionConfig, FusionModel, FusionProcessor, TableSchema
from mmft.fusion.config import KINDS
from mmft.fusion.heads import balanced_weights
from mmft.kinds.base import wait_for_rank_0
from mmft.recipe.schema import ModelSection, Recipe
from mmft.seeds import fold

FILE = "composed.json"
_PARTS = {"text": "tokenizer", "image": "image_processor", "video": "image_processor", "audio": "feature_extractor"}


def compose(recipe: Recipe, folder: Path, samples: Sequence[Sample]) -> ModelSection:
    """The section of the base in `folder`/base. Rank 0 makes it when it is absent or was made of something else."""
    target = folder / "base"
    made_of = _digest(recipe, samples)

    def make() -> None:
        with atomic_folder(target, replace=True) as made:
            _write(recipe, samples, made)
            write_json(made / FILE, {"made_of": made_of, "encoders": dict(recipe.model.encoders)})

    wait_for_rank_0(lambda: _made_of(target) == made_of, make, where=target)
    return recipe.model.model_copy(update={"name_or_path": str(target), "encoders": {}, "revision": None})


def _made_of(target: Path) -> str | None:
    return read_json_file(target / FILE).get("made_of") if (target / FILE).is_file() else None


def _digest(recipe: Recipe, samples: Sequence[Sample]) -> str:
    held = [recipe.model.model_dump(mode="json"), recipe.objective.model_dump(mode="json"), recipe.train.seed]
    return sha256_bytes(to_json([*held, recipe.data.max_length, fingerprint(samples)]).encode())


def _write(recipe: Recipe, samples: Sequence[Sample], folder: Path) -> None:
    config = fusion_config(recipe, samples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(recipe.train.seed, "fusion", "start"))
        model, processor = build(config, samples, recipe.model, max_length=recipe.data.max_length)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def fusion_config(recipe: Recipe, samples: Sequence[Sample]) -> FusionConfig:
    """The configuration of strategy and head, with classes, class weights and target statistics of the training rows.

    Raises DataError for labels that are not usable and RecipeError for values that no head takes."""
    objective = recipe.objective
    strategy, _, rule = objective.strategy.partition("late_")
    config = FusionConfig(
        strategy="late" if rule else strategy,
        late_rule=rule or "average",
        pooling=objective.pooling,
        task=objective.task,
        hidden_size=objective.hidden_size,
        num_layers=1,
        focal_gamma=objective.focal_gamma,
        label_smoothing=objective.label_smoothing_factor,
        modality_dropout=objective.modality_dropout,
        auxiliary_weight=objective.auxiliary_weight,
    )
    names: Sequence[str]
    if objective.task == "regression":
        names = (columns_of(samples).label or "label",)
        values = torch.tensor([numeric_label(sample) for sample in samples])
        config.target_mean, config.target_std = [values.mean().item()], [values.std(correction=0).item() or 1.0]
    elif objective.task == "multi_label":
        names = label_set(samples, objective.classes)
    else:
        names, numbers = sample_classes(samples, classes=objective.classes or None)
        if objective.balance == "weights":
            config.class_weights = balanced_weights(torch.tensor(numbers).bincount(minlength=len(names)).tolist())
    config.id2label = dict(enumerate(names))
    config.label2id = {name: at for at, name in enumerate(names)}
    return config


def known_columns(config: Any, rows: Sequence[Mapping[str, Any]], declared: Mapping[str, str]) -> Columns:
    """The columns of rows as a fusion model's config knows them: those of its encoders by their modality's name, those
    of its table by their own, the label as `declared` or called `label`; others are ignored unless declared a tag or
    id. Raises RecipeError where the config is no fusion model's, or no column is the label.
    """
    if not isinstance(config, FusionConfig):
        raise RecipeError(
            f"{type(config).__name__} is no fusion model",
            where="model.name_or_path",
            allowed="the folder of a fusion model, with streamed rows",
            do="train a few steps on rows that are held; base/ of that run folder is such a model",
        )
    kinds = {entry["name"]: entry["kind"] for entry in config.encoders or ()}
    table = config.table or {"numeric": (), "categorical": ()}
    cells = {column["name"]: kind for kind in ("numeric", "categorical") for column in table[kind]}
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        told = declared.get(name)
        known = cells.get(name) or kinds.get(modality_name(name))
        found[name] = told if told in ("label", "tag", "id") else known or ("label" if name == "label" else "ignored")
    if "label" not in found.values():
        raise RecipeError(
            "no column of the streamed rows is the label",
            where="data.train[].columns",
            allowed=choices(list(found)),
            do="declare it: columns: {NAME: label}",
        )
    return infer_columns([dict.fromkeys(found)], declared=found)


def numeric_label(sample: Sample) -> float:
    """The label of a regression row. Raises DataError where it is no finite number."""
    number = as_float(label_of(sample))
    if number is None or number != number or abs(number) == float("inf"):
        raise DataError(f"the label {label_of(sample)!r} is no finite number", where=sample.where or sample.id)
    return number


def label_set(samples: Sequence[Sample], declared: Sequence[str]) -> tuple[str, ...]:
    """All labels of rows with several, sorted, or the declared ones. Raises DataError for a label that is not declared
    or never occurs."""
    found = {word.strip() for sample in samples for word in label_of(sample).split(NONE)} - {""}
    names = tuple(declared) or tuple(sorted(found))
    unknown, absent = sorted(found - set(names)), [name for name in names if name not in found]
    if unknown or absent or not names:
        raise DataError(
            f"the label(s) {', '.join(unknown)} are not in the declared set"
            if unknown
            else f"the class(es) {', '.join(absent) or 'of the label column'} never occur in training",
            allowed=choices(names, word=unknown[0]) if unknown else "each class with a training row",
            do="mend objective.classes, or the rows",
        )
    return names


def build(
    config: FusionConfig, samples: Sequence[Sample], section: ModelSection, *, max_length: int | None = None
) -> tuple[FusionModel, FusionProcessor]:
    """Model and processor over the encoders that the columns of the rows need; the fusion starts at random (global
    torch seed). Two text columns have an encoder each, both from the same weights.

    Raises RecipeError for a column without an encoder and an encoder without a column.
    """
    columns = columns_of(samples)
    loaded: dict[str, tuple[str, Any]] = {}
    parts: dict[str, tuple[str, Any]] = {}
    used = set()
    for modality, names in columns.modalities.items():
        if modality == TABLE:
            continue
        kind = columns.kinds[names[0]]
        key = next((one for one in (names[0], modality, kind) if one in section.encoders), None)
        if key is None:
            raise RecipeError(
                f"the column '{names[0]}' holds {kind} and no encoder is given for that",
                where=f"model.encoders: {kind}",
                allowed="a hub id, a folder, shipped:NAME",
                do=f"name one, or declare the column 'ignored' (data.train[].columns: {{{names[0]}: ignored}})",
            )
        used.add(key)
        model, part = load_encoder(section, section.encoders[key], kind)
        loaded[modality], parts[modality] = (kind, model), (kind, part)
    unused = sorted(set(section.encoders) - used)
    if unused:
        there = [*(name for names in columns.modalities.values() for name in names), *KINDS]
        raise RecipeError(
            f"the encoder of '{unused[0]}' has no column to read",
            where=f"model.encoders: {unused[0]}",
            allowed=choices(there, word=unused[0]),
            do="take it out, or declare its column in data.train[].columns",
        )
    schema = table_schema(samples)
    config.table = None if schema is None else schema.as_config()
    limits = [int(part.model_max_length) for kind, part in parts.values() if kind == "text"]
    longest = min([*limits, *([max_length] if max_length else [])], default=None)
    classes = [] if config.task == "regression" else list((config.id2label or {}).values())
    processor = FusionProcessor(parts, schema, max_length=longest, task=config.task, classes=classes)
    return FusionModel.from_encoders(config, loaded), processor


def load_encoder(section: ModelSection, name: str, kind: str) -> tuple[Any, Any]:
    """A pretrained model in float32 and the part of its processor that reads this kind of column.

    Raises BackboneError for a model without one."""
    wanted = section.model_copy(update={"name_or_path": name, "encoders": {}, "dtype": "float32"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*they start at random.*")  # poolers, which are never asked
        backbone = load_backbone(wanted)
    part = getattr(backbone.processor, _PARTS[kind], backbone.processor)
    if part is None:
        raise BackboneError(
            f"{name} has no {_PARTS[kind].replace('_', ' ')}",
            where=f"model.encoders: {kind}",
            do="add the processor's files to the model folder",
        )
    return backbone.model, part


def table_schema(samples: Sequence[Sample]) -> TableSchema | None:
    """Means, deviations and categories of the table's columns over these rows; None without such columns."""
    columns = columns_of(samples)
    numeric, categorical = columns.of_kind("numeric"), columns.of_kind("categorical")
    if not numeric and not categorical:
        return None
    rows: list[Mapping[str, Any]] = [
        {name: sample.cells[name].value for name in (*numeric, *categorical)} for sample in samples
    ]
    return TableSchema.fit(rows, numeric=numeric, categorical=categorical)
