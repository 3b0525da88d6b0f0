"""The short way to a fused classifier: `fitted = fit(frame, label="y")`, `.evaluate(frame)`, `.predict(frame)`.

It trains with the engine's loop; frozen encoders read each row once. Nothing but the result is kept.
"""

from __future__ import annotations

import copy
import math
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted, ParamGroup
from mmft.adapters.targets import Target
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.parts import find_parts
from mmft.data.fused import FusedRenderer
from mmft.data.order import StepPlan
from mmft.data.sample import Sample
from mmft.data.table_rows import label_of, open_sample, sample_classes, table_samples
from mmft.data.tables import Columns, as_float, infer_columns, load_table
from mmft.engine.callbacks import Callback
from mmft.engine.loop import Engine, TrainJob
from mmft.engine.state import TrainState
from mmft.errors import BackboneError, DataError, RecipeError, choices
from mmft.evaluation.metrics.classification import classify
from mmft.evaluation.metrics.classification_intervals import ClassInterval, class_interval
from mmft.evaluation.metrics.classification_ranks import measure
from mmft.files import read_json_file, write_json
from mmft.fusion import FusionConfig, FusionModel, FusionProcessor, TableSchema
from mmft.fusion.heads import balanced_weights, decide, probabilities
from mmft.fusion.store import FeatureStore
from mmft.journal import Journal
from mmft.objectives.classification import ClassificationObjective
from mmft.recipe.schema import ModelSection, TrainSection
from mmft.seeds import fold
from mmft.stages import make_accelerator

TASKS = ("single_label", "ordinal", "regression")
_METRICS = {
    "single_label": ("accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "log_loss", "ece"),
    "ordinal": ("accuracy", "balanced_accuracy", "quadratic_kappa", "mae", "log_loss", "ece"),
    "regression": ("mae", "rmse", "r2"),
}
_FILE = "fitted.json"
_LONGEST = 512
"""Tokens of a text; a tokenizer may allow fewer."""
_READ = 16
"""Rows that frozen encoders read at once."""
ENCODERS = {
    "text": "shipped:minilm",
    "image": "shipped:efficientnet-lite0",
    "video": "shipped:efficientnet-lite0",
    "audio": "shipped:whisper-tiny-5s",
}
"""Encoders of the kinds for which none is given; they come inside pip packages."""


@dataclass(frozen=True)
class Fitted:
    """A trained model with its processor and the columns it was trained on; `classes` is empty for regression.
    `losses`: the mean loss of every step."""

    model: FusionModel
    processor: FusionProcessor
    columns: Columns
    classes: tuple[str, ...]
    root: Path | None = None
    batch_size: int = 16
    losses: tuple[float, ...] = ()

    def predict(self, source: Any) -> list[dict[str, Any]]:
        """Per row `{"prediction": class or number, "probabilities": {class: p}}` (the latter not for regression). The
        label column is not needed. Raises DataError for a column that is gone and for a bad cell, with its row."""
        outputs = self._outputs(self._samples(source, labelled=False))
        config = self.model.config
        chosen, chances = decide(config, outputs), probabilities(config, outputs)
        if config.task == "regression":
            return [{"prediction": value} for value in chosen[:, 0].tolist()]
        return [
            {"prediction": self.classes[at], "probabilities": dict(zip(self.classes, row, strict=True))}
            for at, row in zip(chosen.tolist(), chances.tolist(), strict=True)
        ]

    def evaluate(self, source: Any, *, resamples: int = 1000, seed: int = 0) -> dict[str, ClassInterval]:
        """Metrics of the task with 95 % intervals over rows. Raises DataError for empty and unknown labels."""
        rows = self._samples(source, labelled=True)
        config = self.model.config
        if config.task == "regression":
            truth = _targets(rows)
            found = measure(decide(config, self._outputs(rows))[:, 0].tolist(), truth)
            answers = dict.fromkeys(_METRICS["regression"], found)
        else:
            _, numbers = sample_classes(rows, classes=self.classes, training=False)
            outputs = self._outputs(rows)
            chances = probabilities(config, outputs.double()).numpy()
            found = classify(chances, numbers, classes=len(self.classes))
            answers = dict.fromkeys(_METRICS[config.task], found)
            if config.task == "ordinal":  # the median class, which is what such a model predicts
                median = decide(config, outputs).tolist()
                decided = classify(median, numbers, classes=len(self.classes))
                answers |= dict.fromkeys(("accuracy", "balanced_accuracy", "quadratic_kappa"), decided)
                answers["mae"] = measure(median, numbers)
        return {
            name: class_interval(name, answers[name], resamples=resamples, seed=seed) for name in _METRICS[config.task]
        }

    def save(self, folder: str | Path) -> None:
        """Write model, processor and columns into `folder`."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_json(Path(folder) / _FILE, {"columns": asdict(self.columns), "classes": list(self.classes)})

    @classmethod
    def load(cls, folder: str | Path, *, root: Path | None = None) -> Fitted:
        """Back from `save`; media paths of later rows lie below `root`."""
        held = read_json_file(Path(folder) / _FILE)
        modalities = {name: tuple(columns) for name, columns in held["columns"].pop("modalities").items()}
        model = FusionModel.from_pretrained(folder)
        processor = FusionProcessor.from_pretrained(folder)
        return cls(
            model.eval(), processor, Columns(**held["columns"], modalities=modalities), tuple(held["classes"]), root
        )

    def _samples(self, source: Any, *, labelled: bool) -> list[Sample]:
        return table_samples(source, self.columns, root=self.root, labelled=labelled)

    def _outputs(self, rows: Sequence[Sample]) -> torch.Tensor:
        self.model.eval()
        parts = []
        with torch.no_grad():
            for start in range(0, len(rows), self.batch_size):
                batch = _batch(self.processor, rows[start : start + self.batch_size])
                parts.append(self.model(**batch).logits)
        return torch.cat(parts)


def fit(
    source: Any,
    *,
    label: str,
    columns: Mapping[str, str] | None = None,
    encoders: Mapping[str, str] | None = None,
    task: str = "single_label",
    classes: Sequence[Any] | None = None,
    balanced: bool = False,
    root: Path | None = None,
    epochs: int = 10,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    encoder_learning_rate: float | None = None,
    seed: int = 0,
    fusion: FusionConfig | None = None,
    quiet: bool = False,
) -> Fitted:
    """Train a fusion model on a table (`data.tables.load_table`) and give it back with its processor; the columns, as
    given and as inferred, are printed unless `quiet`.

    columns: kinds that are not to be inferred; encoders: kind -> model folder or hub id, `ENCODERS` where a kind has
    none; classes: the declared set, in order for ordinal; balanced: class weights N / (C n_c); root: folder of media
    paths (a file's own, else the working folder); encoder_learning_rate: None keeps the encoders frozen; fusion:
    strategy, sizes, dropouts.
    Raises RecipeError for an unknown task or a missing encoder, DataError for bad rows and labels, NonFiniteError.
    """
    if task not in TASKS:
        raise RecipeError(f"'{task}' is no task", allowed=choices(TASKS, word=task), do="use one of these")
    table = load_table(source)
    found = infer_columns(table, label=label, declared=columns)
    Journal(None, quiet=quiet).say(found.table())
    rows = table_samples(source if isinstance(source, str | Path) else table, found, root=root)
    config = copy.deepcopy(fusion) if fusion is not None else FusionConfig()
    config.task = task
    if task == "regression":
        names: tuple[str, ...] = ()
        labels = torch.tensor(_targets(rows), dtype=torch.float32).unsqueeze(1)
        config.id2label = {0: label}
        config.target_mean, config.target_std = [labels.mean().item()], [labels.std(correction=0).item() or 1.0]
    else:
        names, numbers = sample_classes(rows, classes=classes)
        labels = torch.tensor(numbers)
        config.id2label = dict(enumerate(names))
        config.class_weights = balanced_weights(labels.bincount(minlength=len(names)).tolist()) if balanced else None
    config.label2id = {str(name): at for at, name in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold(seed, "fit", "start"))
        model, processor = _build(config, rows, found, encoders=encoders or {})
        processor.task, processor.classes = task, names
        losses = _train(
            Fitted(model, processor, found, names, root, batch_size),
            rows,
            epochs=epochs,
            rates=(learning_rate, encoder_learning_rate),
            seed=seed,
        )
    return Fitted(model.eval(), processor, found, names, root, batch_size, tuple(losses))


def _build(
    config: FusionConfig, rows: list[Sample], columns: Columns, *, encoders: Mapping[str, str]
) -> tuple[FusionModel, FusionProcessor]:
    """One encoder per modality: two text columns have one each, both starting from the same weights."""
    loaded, parts = {}, {}
    for modality, names in columns.modalities.items():
        kind = columns.kinds[names[0]]
        if kind in ("numeric", "categorical"):
            continue
        backbone = _encoder(kind, encoders, names[0])
        part = backbone.processor
        for inner in _PARTS[kind]:
            part = getattr(part, inner, part)
        loaded[modality], parts[modality] = (kind, backbone.model), (kind, part)
    numeric, categorical = columns.of_kind("numeric"), columns.of_kind("categorical")
    schema = None
    if numeric or categorical:
        opened = [{name: row.cells[name].value for name in (*numeric, *categorical)} for row in rows]
        schema = TableSchema.fit(opened, numeric=numeric, categorical=categorical)
        config.table = schema.as_config()
    model = FusionModel.from_encoders(config, loaded)
    return model, FusionProcessor(parts, schema)


_PARTS = {
    "text": ("tokenizer",),
    "image": ("image_processor",),
    "video": ("image_processor",),
    "audio": ("feature_extractor",),
}


def _encoder(kind: str, encoders: Mapping[str, str], column: str) -> Backbone:
    """The encoder given for a kind of column, else the shipped one."""
    name = encoders.get(kind, ENCODERS[kind])
    try:
        return load_backbone(ModelSection(name_or_path=name, dtype="float32"))
    except BackboneError as error:
        if kind in encoders:
            raise
        raise RecipeError(
            f"the column '{column}' holds {kind}, no encoder is given for that, and {name} cannot be loaded: "
            f"{error.problems[0].what}",
            where=f"encoders[{kind!r}]",
            allowed="a model folder or a hub id",
            do=f"pass encoders={{{kind!r}: ...}}, or declare the column 'ignored'",
        ) from error


class _Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Keep it."""
        self.values.append(metrics["loss"])

    def on_start(self, state: TrainState, total_steps: int) -> None:
        """Nothing."""
        return None

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Nothing."""
        return None

    def on_save(self, state: TrainState, folder: Path) -> None:
        """Nothing."""
        return None

    def on_end(self, state: TrainState) -> None:
        """Nothing."""
        return None


def _train(
    fitted: Fitted, rows: list[Sample], *, epochs: int, rates: tuple[float, float | None], seed: int
) -> list[float]:
    """Train in place; `rates`: of the fusion, and of the encoders or None where they are frozen."""
    model, losses = fitted.model, _Losses()
    renderer = FusedRenderer(fitted.processor, max_length=_LONGEST, over_length="truncate_text")
    section = TrainSection(
        seed=seed,
        per_device_train_batch_size=min(fitted.batch_size, len(rows)),
        num_train_epochs=epochs,
        learning_rate=rates[0],
        weight_decay=0.01,
        warmup_ratio=0.05,
        bf16=False,
        save_steps=0,
    )
    plan = StepPlan(
        rows=len(rows), micro_batch=section.per_device_train_batch_size, micro_per_step=1, world=1, seed=seed
    )
    with tempfile.TemporaryDirectory() as scratch:
        if rates[1] is None and len(model.encoders):
            held = (renderer.inputs(rows[at : at + _READ]) for at in range(0, len(rows), _READ))
            renderer.use(FeatureStore.build(Path(scratch) / "features", model, held, list(model.encoders)), rows)
        job = TrainJob(
            adapted=_adapted(fitted, rates[1]),
            objective=ClassificationObjective(model),
            samples=rows,
            eval_samples=[],
            renderer=renderer,
            plan=plan,
            total_steps=plan.steps_for(epochs),
            eval_batch_size=fitted.batch_size,
            section=section,
            folder=Path(scratch),
            identity={},
        )
        accelerator = make_accelerator(section)
        engine = Engine(job, accelerator=accelerator, journal=Journal(None, quiet=True), callbacks=[losses])
        stopped = engine.fit(resume=False).stopped or ""
    if stopped.startswith("signal"):  # Ctrl-C interrupts the caller too, who has no half-trained model
        signal.raise_signal(int(stopped.split()[1]))
    return losses.values


def _adapted(fitted: Fitted, encoder_rate: float | None) -> Adapted:
    """The model as the engine trains it: the fusion whole, and the encoders with a rate of their own or not at all."""
    model, parts = fitted.model, find_parts(fitted.model)
    model.requires_grad_(True)
    model.encoders.requires_grad_(encoder_rate is not None)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = []
    for part in dict.fromkeys(parts.part_of(name) for name in trained):
        for inside in (False, True):
            names = [n for n in trained if parts.part_of(n) == part and n.startswith("encoders.") == inside]
            groups += [ParamGroup(part, tuple(names), encoder_rate if inside else None)] if names else []
    targets = tuple(Target(group.part, "other", (), "full") for group in groups)
    backbone = Backbone(model, fitted.processor, parts, None, "fitted", None, False)
    return Adapted(model, backbone, targets, "full", tuple(groups))


def _batch(processor: FusionProcessor, rows: Sequence[Sample]) -> dict[str, Any]:
    rates = {int(part.sampling_rate) for kind, part in processor.parts.values() if kind == "audio"}
    rate = rates.pop() if rates else 16000
    return processor([open_sample(row, sampling_rate=rate, frames=processor.max_frames) for row in rows])


def _targets(rows: Sequence[Sample]) -> list[float]:
    out = []
    for row in rows:
        number = as_float(label_of(row))
        if number is None or not math.isfinite(number):
            raise DataError(f"the label {label_of(row)!r} is no finite number", where=row.where, do="mend it")
        out.append(number)
    return out
