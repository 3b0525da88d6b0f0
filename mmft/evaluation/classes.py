"""Evaluation of a fusion model on sets of a table's rows: answers of each model, metrics with intervals, and what each
modality is worth.

The encoders read a set once; scores with modalities removed, alone and shuffled come from the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmft.data.fused import FusedRenderer
from mmft.data.sample import Sample
from mmft.data.tables import TABLE
from mmft.evaluation.metrics.classification import Answers, classify, confusion_matrix, reliability
from mmft.evaluation.metrics.classification_intervals import class_difference, class_interval
from mmft.evaluation.metrics.classification_ranks import measure, roc_curve
from mmft.evaluation.modalities import ModalityWorth, Worths, keep_modalities, modality_worths, shuffle_modality
from mmft.evaluation.scores import PAIRS, UNTAGGED
from mmft.fusion.config import FusionConfig
from mmft.fusion.heads import decide, probabilities
from mmft.seeds import fold

_AVERAGED = tuple(f"{average}_{kind}" for average in ("macro", "micro") for kind in ("precision", "recall", "f1"))
_CLASSES = ("accuracy", "balanced_accuracy", *_AVERAGED, "roc_auc", "pr_auc", "log_loss", "ece")
METRICS: dict[str, tuple[str, ...]] = {
    "single_label": _CLASSES,
    "multi_label": ("accuracy", *_CLASSES[2:]),
    "ordinal": ("accuracy", "balanced_accuracy", "quadratic_kappa", "mae", "macro_f1", "log_loss", "ece"),
    "regression": ("mae", "rmse", "r2"),
}
"""Task -> metrics; the first is the headline."""
_IN_GROUPS = ("accuracy", "balanced_accuracy", "macro_f1", "quadratic_kappa", "mae", "rmse")
_DECIDED = ("accuracy", "balanced_accuracy", "quadratic_kappa", "macro_f1")
"""Of ordered classes these are of the median class, which such a model predicts."""
MOST_ROWS = 1000
"""Rows, evenly spaced, behind the worth of a modality."""
_CURVE = 60
"""Points of a ROC curve in the report."""


@dataclass(frozen=True)
class SetOutputs:
    """One model's answers to a set: outputs (N, O) on the CPU, and the worths where they were asked for."""

    outputs: Tensor
    worths: Worths | None


@torch.no_grad()
def answer_set(
    model: Any,
    renderer: FusedRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    resamples: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> SetOutputs:
    """Outputs of all rows, and the worth of each modality on up to `MOST_ROWS` of them. The model is put into eval()
    and back."""
    was_training = model.training
    model.eval()
    fusion = inner(model)
    every = max(1, -(-len(samples) // MOST_ROWS))
    held, outputs = [], []
    try:
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            batch = _encoded(fusion, renderer.inputs(chosen))
            outputs.append(model(**batch).logits.float().cpu())
            held += [_row(batch, at) for at in range(len(chosen)) if (start + at) % every == 0]
            progress(len(chosen))
        kept = samples[::every]
        worths = None
        if len(fusion.config.modalities) > 1 and len(kept) > 1:
            worths = _worths(model, held, renderer.targets(kept), (batch_size, resamples, seed))
    finally:
        model.train(was_training)
    return SetOutputs(torch.cat(outputs), worths)


def inner(model: Any) -> Any:
    """The `FusionModel` itself, where peft is around it."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def _encoded(fusion: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the tokens of every encoder in the place of its inputs, on the model's device."""
    batch = FusedRenderer.place(found, fusion)
    for name, inputs in batch["modalities"].items():
        if name == TABLE or "features" in inputs:
            continue
        rows = batch["present"][name].nonzero().flatten()
        tokens, mask = fusion.encode(name, {key: value[rows] for key, value in inputs.items()})
        there = mask.new_zeros(len(batch["present"][name]), mask.shape[1])
        whole = tokens.new_zeros(len(there), *tokens.shape[1:])
        whole[rows], there[rows] = tokens, mask
        batch["modalities"][name] = {"features": whole, "mask": there}
    return batch


Row = dict[str, Any]


def _row(batch: Mapping[str, Any], at: int) -> Row:
    """One row of an encoded batch without its padding."""
    inputs: dict[str, Any] = {}
    for name, held in batch["modalities"].items():
        if not bool(batch["present"][name][at]):
            continue
        if name == TABLE:
            inputs[name] = {key: value[at] for key, value in held.items()}
        else:
            inputs[name] = {"features": held["features"][at][held["mask"][at]]}
    return inputs


def _joined(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Rows of `_row` as one batch."""
    modalities: dict[str, Any] = {}
    present = {name: torch.tensor([name in row for row in rows]) for name in names}
    for name in names:
        example = next((row[name] for row in rows if name in row), None)
        if example is None:
            continue
        if name == TABLE:
            modalities[name] = {
                key: torch.stack([row[name][key] if name in row else torch.zeros_like(value) for row in rows])
                for key, value in example.items()
            }
        else:
            tokens = [row[name]["features"] if name in row else example["features"][:0] for row in rows]
            padded = pad_sequence(tokens, batch_first=True)
            lengths = torch.tensor([len(one) for one in tokens], device=padded.device)
            modalities[name] = {
                "features": padded,
                "mask": torch.arange(padded.shape[1], device=padded.device) < lengths[:, None],
            }
    return {"modalities": modalities, "present": present}


def _worths(model: Any, rows: Sequence[Row], labels: Tensor, settings: tuple[int, int, int]) -> Worths:
    """Per-row scores: 1 for a right decision; for regression minus the absolute error, of several labels the share of
    right ones."""
    size, resamples, seed = settings
    config: FusionConfig = inner(model).config
    names = config.modalities
    batches = [_joined(rows[start : start + size], names) for start in range(0, len(rows), size)]

    def scored(parts: Sequence[Mapping[str, Any]]) -> np.ndarray:
        outputs = torch.cat([model(**part).logits.float().cpu() for part in parts])
        found = decide(config, outputs)
        if config.task == "regression":
            return -(found - labels).abs().mean(dim=1).double().numpy()
        right = (found == (labels > 0.5)).double().mean(dim=1) if config.task == "multi_label" else found == labels
        return right.double().numpy()

    def with_only(subset: Collection[str]) -> np.ndarray:
        return scored([keep_modalities(batch, subset) for batch in batches])

    def shuffled(name: str) -> np.ndarray:
        order = shuffle_modality(
            {"modalities": {}, "present": {name: torch.arange(len(rows))}}, name, seed=seed
        )["present"][name].tolist()  # fmt: skip
        mixed = []
        for at, other in enumerate(order):
            kept = {key: value for key, value in rows[at].items() if key != name}
            mixed.append(kept | ({name: rows[other][name]} if name in rows[other] else {}))
        return scored([_joined(mixed[start : start + size], names) for start in range(0, len(rows), size)])

    return modality_worths(names, with_only, shuffled=shuffled, resamples=resamples, seed=seed)


# ---------------------------------------------------------------- scores


def score_sets(
    found: Mapping[str, Mapping[str, SetOutputs]],
    sets: Mapping[str, Sequence[Sample]],
    renderer: FusedRenderer,
    config: FusionConfig,
    *,
    group_by: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`headline`, `scores` and `sets` of the report from outputs by model and set; metrics without a meaning on a set
    (no class with both kinds of rows) are left out."""
    scored = {}
    for name, samples in sets.items():
        truth = renderer.targets(samples)
        answers = {model: answers_of(config, one[name].outputs, truth) for model, one in found.items()}
        names = METRICS[config.task]
        draw = (resamples, fold(seed, "classes", name))
        scored[name] = {
            **_part(answers, names, draw),
            "groups": _groups(answers, samples, group_by, tuple(one for one in names if one in _IN_GROUPS), draw),
            "classes": [] if config.task == "regression" else list(renderer.classes),
            "figures": {model: _figures(one) for model, one in answers.items()},
            "worth": {model: _worth(one[name].worths) for model, one in found.items() if one[name].worths is not None},
        }
    first = next(iter(scored.values()))
    return {"headline": METRICS[config.task][0], "scores": first["scores"], "sets": scored}


def answers_of(config: FusionConfig, outputs: Tensor, truth: Tensor) -> dict[str, Answers]:
    """`chances`: by the largest probability; `decided`: what the model decides, where that differs (ordered classes);
    `numbers`: for mae, rmse and r2."""
    if config.task == "regression":
        return {"numbers": measure(decide(config, outputs).numpy(), truth.numpy())}
    chances = probabilities(config, outputs.double()).numpy()
    labels = truth.long().numpy()
    answers = {"chances": classify(chances, labels, classes=int(config.num_labels or 0))}
    if config.task == "ordinal":
        median = decide(config, outputs).numpy()
        answers["decided"] = classify(median, labels, classes=int(config.num_labels or 0))
        answers["numbers"] = measure(median, labels)
    return answers


def _for(metric: str, answers: Mapping[str, Answers]) -> Answers:
    if metric in ("mae", "rmse", "r2"):
        return answers["numbers"]
    return answers["decided"] if metric in _DECIDED and "decided" in answers else answers["chances"]


def _part(answers: Mapping[str, Mapping[str, Answers]], names: Sequence[str], draw: tuple[int, int]) -> dict[str, Any]:
    """`rows`, `scores` and `paired` of some rows."""
    resamples, seed = draw
    scores: dict[str, Any] = {}
    for model, one in answers.items():
        values = {name: class_interval(name, _for(name, one), resamples=resamples, seed=seed) for name in names}
        scores[model] = {name: value.as_dict() for name, value in values.items() if np.isfinite(value.value)}
    paired: dict[str, Any] = {}
    for first, second in PAIRS:
        if {first, second} <= answers.keys():
            metrics = {
                name: class_difference(
                    name, _for(name, answers[first]), _for(name, answers[second]), resamples=resamples, seed=seed
                ).as_dict()
                for name in names
                if name in scores[first] and name in scores[second]
            }
            paired[f"{first}-{second}"] = {**metrics[names[0]], "metrics": metrics}
    rows = len(next(iter(next(iter(answers.values())).values())).truth)
    return {"rows": rows, "scores": scores, "paired": paired}


def _groups(
    answers: Mapping[str, Mapping[str, Answers]],
    samples: Sequence[Sample],
    group_by: Sequence[str],
    names: Sequence[str],
    draw: tuple[int, int],
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for tag in group_by:
        values = [str(sample.tags.get(tag, UNTAGGED)) for sample in samples]
        groups[tag] = {}
        for value in sorted(set(values)):
            chosen = np.asarray([one == value for one in values])
            part = {
                model: {kind: _rows(found, chosen) for kind, found in one.items()} for model, one in answers.items()
            }
            groups[tag][value] = _part(part, names, draw)
    return groups


def _rows(answers: Answers, chosen: np.ndarray) -> Answers:
    chances = None if answers.chances is None else answers.chances[chosen]
    return Answers(answers.truth[chosen], answers.decisions[chosen], chances, answers.classes)


def _figures(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Confusion matrix, reliability bins, and a ROC curve of each class that has one."""
    if "chances" not in answers:
        return {}
    one = answers["chances"]
    curves: dict[str, Any] = {}
    for label in range(one.classes):
        wrong, right = roc_curve(one, label)
        if np.isfinite(wrong).all() and np.isfinite(right).all():
            kept = np.unique(np.linspace(0, len(wrong) - 1, _CURVE).astype(int))
            curves[str(label)] = [wrong[kept].tolist(), right[kept].tolist()]
    bins = {
        key: [None if np.isnan(value) else float(value) for value in values.astype(float)]
        for key, values in reliability(one).items()
    }
    return {"confusion": confusion_matrix(answers.get("decided", one)).tolist(), "reliability": bins, "roc": curves}


def _worth(worths: Worths | None) -> dict[str, Any]:
    assert worths is not None
    kinds = ("alone", "without", "shuffled", "loss_without", "loss_shuffled", "shapley")

    def of(one: ModalityWorth) -> dict[str, Any]:
        return {kind: value.as_dict() for kind in kinds if (value := getattr(one, kind)) is not None}

    return {
        "full": worths.full.as_dict(),
        "empty": worths.empty.as_dict(),
        "modalities": {one.name: of(one) for one in worths.modalities},
    }
