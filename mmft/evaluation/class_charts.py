"""The part of the report that classification has beside its scores: confusion, calibration, ROC curves, modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mmft.evaluation.plots import Lane, Mark, forest_chart, line_chart

_MOST_CURVES = 10
_KINDS = {
    "alone": "with this modality alone",
    "without": "with this modality missing",
    "shuffled": "with its rows dealt out anew",
}


def class_figures(entry: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any] | None:
    """What the template shows of one set; None for a set that has no such figures. The figures are those of the
    adapter model, or of the last one the run compares."""
    figures: Mapping[str, Any] = entry.get("figures") or {}
    worth: Mapping[str, Any] = entry.get("worth") or {}
    if not figures and not worth:
        return None
    model = "adapter" if "adapter" in models else models[-1]
    classes = [str(name) for name in entry.get("classes") or ()]
    own = figures.get(model) or {}
    curves = _roc(own.get("roc") or {}, classes)
    return {
        "model": model,
        "confusion": _confusion(own.get("confusion") or [], classes),
        "reliability": Markup(_reliability(figures)),
        "roc": Markup(line_chart(curves, title="ROC curves", x_label="false positive rate")),
        "curves": [(name, f"s-{_plain(name)}") for name in curves],
        "left_out": max(0, len(own.get("roc") or {}) - _MOST_CURVES),
        "worth": _worth(worth, models),
        "chart": Markup(_worth_chart(worth, models)),
    }


def _plain(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name)


def _confusion(matrix: Sequence[Any], classes: Sequence[str]) -> dict[str, Any] | None:
    """Rows of counts with the share of the row each is, for its shade; none for several labels per row."""
    if not matrix or isinstance(matrix[0][0], list):
        return None
    rows = []
    for name, counts in zip(classes, matrix, strict=True):
        total = sum(counts)
        shades = [round(100 * count / total) if total else 0 for count in counts]
        rows.append({"label": name, "rows": total, "cells": list(zip(counts, shades, strict=True))})
    return {"classes": classes, "rows": rows}


def _reliability(figures: Mapping[str, Any]) -> str:
    """Accuracy against mean probability, a curve per model; perfect calibration is the diagonal."""
    series: dict[str, list[tuple[float, float]]] = {"perfect": [(0.0, 0.0), (1.0, 1.0)]}
    for model, one in figures.items():
        bins = one.get("reliability") or {}
        pairs = zip(bins.get("confidence") or (), bins.get("accuracy") or (), strict=True)
        series[model] = [(x, y) for x, y in pairs if x is not None and y is not None]
    return line_chart(series, title="Share of right answers by probability", x_label="probability of the answer")


def _roc(curves: Mapping[str, Any], classes: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    return {classes[int(label)]: list(zip(*curve, strict=True)) for label, curve in list(curves.items())[:_MOST_CURVES]}


def _worth(worth: Mapping[str, Any], models: Sequence[str]) -> list[dict[str, Any]]:
    """Per model: the scores with all modalities and with none, and a row for each modality."""
    kinds = (*_KINDS, "loss_without", "loss_shuffled", "shapley")
    out = []
    for model in (one for one in models if one in worth):
        rows = [
            {"name": name, "cells": [_cell(values.get(kind)) for kind in kinds]}
            for name, values in worth[model]["modalities"].items()
        ]
        out.append(
            {"model": model, "full": _cell(worth[model]["full"]), "empty": _cell(worth[model]["empty"]), "rows": rows}
        )
    return out


def _cell(found: Mapping[str, Any] | None) -> dict[str, str] | None:
    if not found:
        return None
    return {"value": f"{found['value']:.3f}", "range": f"{found['low']:.3f} to {found['high']:.3f}"}


def _worth_chart(worth: Mapping[str, Any], models: Sequence[str]) -> str:
    """Scores of every model with each modality alone, missing and shuffled; scores below 0 (regression) have none."""
    kept = [model for model in models if model in worth]
    if not kept or any(worth[model]["full"]["value"] < 0 for model in kept):
        return ""
    lanes = [_lane("all modalities", [(model, worth[model]["full"]) for model in kept])]
    for kind, words in _KINDS.items():
        lanes.append(Lane(label=words, note="", marks=(), heading=True))
        for name in worth[kept[0]]["modalities"]:
            found = [(model, worth[model]["modalities"][name].get(kind)) for model in kept]
            lanes.append(_lane(name, [(model, one) for model, one in found if one]))
    return forest_chart(lanes, title="Accuracy by modality with 95 % intervals", series=models)


def _lane(label: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> Lane:
    marks = tuple(Mark(model, one["value"], one["low"], one["high"]) for model, one in found)
    return Lane(label=label, note="", marks=marks)
