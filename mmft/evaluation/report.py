"""report.html: one self-contained page about a run, rebuilt at any time from the files of the run folder.

The page asks nothing of a network (its content policy forbids it), holds no script, and shows every text of recipe,
data and models as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mmft.errors import CheckpointError
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.by_source import source_curves, source_table, told_of
from mmft.evaluation.cards import changed_cards
from mmft.evaluation.class_charts import class_figures
from mmft.evaluation.plots import Lane, Mark, Point, forest_chart, legend_shape, line_chart
from mmft.evaluation.verdict import LOWER_IS_BETTER, agreement, label, probability, verdict
from mmft.files import write_text
from mmft.journal import read_jsonl

__all__ = ["rebuild_report", "write_report"]

# Rows of the forest chart and of a group table; a tag with hundreds of values would bury the page.
_MOST_GROUPS = 24
_PART_COLUMNS = ("part", "what", "mode", "modules", "parameters")


def write_report(
    run_folder: Path,
    report: Mapping[str, Any],
    *,
    metrics_jsonl: Path | None = None,
    predictions: Path | Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write `run_folder`/report.html and return its path; pieces that are missing are left out of the page.

    `report` is the content of report.json; the two others default to the run folder's files. The page stays below
    3 MB: 40 samples at most, pictures of 192 px, 1.9 MB of them.
    """
    metrics_path = metrics_jsonl if metrics_jsonl is not None else run_folder / "metrics.jsonl"
    rows = list(read_jsonl(metrics_path)) if metrics_path.is_file() else []
    records = _records(run_folder, predictions)
    page = _environment().get_template("report.html.j2").render(_context(run_folder, report, rows, records=records))
    path = run_folder / "report.html"
    write_text(path, page)
    return path


def rebuild_report(run_folder: Path) -> Path:
    """Write the page again from report.json, metrics.jsonl, predictions.jsonl and recipe.yaml of the run folder.

    Raises CheckpointError when report.json is missing or broken.
    """
    path = run_folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            "the run has no report yet", where=str(path), do="let the run finish, or run `mmft evaluate` on it"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path), do="run `mmft evaluate` on the run") from error
    if not isinstance(report, dict):
        raise CheckpointError("report.json holds no object", where=str(path), do="run `mmft evaluate` on the run")
    return write_report(run_folder, report)


def _records(run_folder: Path, predictions: Path | Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    if predictions is None:
        predictions = run_folder / "predictions.jsonl"
        if not predictions.is_file():
            return []
    return PredictionStore.read(predictions).records if isinstance(predictions, Path) else predictions


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _context(
    run_folder: Path,
    report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    *,
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything the template prints, already in words."""
    sets: Mapping[str, Any] = report.get("sets") or {}
    headline = _headline(report)
    models = list(dict.fromkeys(model for entry in sets.values() for model in entry["scores"]))
    worst, best = changed_cards(records, headline, folder=run_folder) if headline else ([], [])
    recipe = run_folder / "recipe.yaml"
    return {
        "name": report.get("name") or run_folder.name,
        "verdict": verdict(report, records),
        "models": [(model, Markup(legend_shape(index, model))) for index, model in enumerate(models)],
        "sets": [_set(name, entry, models, headline=headline, records=records) for name, entry in sets.items()],
        "curves": [*_curves(metrics), *_by_source(metrics), *_charts(report.get("charts") or [])],
        "sources": source_table(metrics),
        "merge": _merge(report.get("merge") or {}),
        "parts": _parts((report.get("training") or {}).get("parts") or []),
        "facts": _facts(report),
        "watch": _merge(report.get("online") or {}),
        "versions": sorted(((report.get("training") or {}).get("versions") or {}).items()),
        "worst": worst,
        "best": best,
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    }


def _headline(report: Mapping[str, Any]) -> str:
    first: Mapping[str, Any] = next(iter((report.get("scores") or {}).values()), {})
    return report.get("headline") or next(iter(first), "")


# ---------------------------------------------------------------- scores


def _set(
    name: str, entry: Mapping[str, Any], models: Sequence[str], *, headline: str, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One evaluation set: the table of scores, the forest chart and the tables per group."""
    metrics = list(next(iter(entry["scores"].values())))
    answers = agreement([row for row in records if row["set"] == name], "merged", "adapter")
    groups: Mapping[str, Any] = entry.get("groups") or {}
    shown = {tag: dict(list(values.items())[:_MOST_GROUPS]) for tag, values in groups.items()}
    everything = {"rows": _count(entry), "scores": entry["scores"]}
    lanes = [_lane("all rows", everything, headline, models=models)]
    for tag, values in shown.items():
        lanes.append(Lane(label=f"by {_tag(tag)}", note="", marks=(), heading=True))
        lanes.extend(_lane(_value(value), part, headline, models=models) for value, part in values.items())
    return {
        "name": name,
        "rows": f"{_count(entry):,}",
        "table": [_score_row(label(metric), entry, metric, models) for metric in metrics],
        "headline": label(headline),
        "chart": Markup(forest_chart(lanes, title=f"{label(headline)} on {name} with 95 % intervals", series=models)),
        "groups": [
            {
                "tag": _tag(tag),
                "rows": [_score_row(_value(value), part, headline, models) for value, part in values.items()],
                "left_out": len(groups[tag]) - len(values),
                "folded": "," in tag,
            }
            for tag, values in shown.items()
        ],
        "answers": answers if answers[1] else None,
        "classification": class_figures(entry, models),
    }


def _score_row(first: str, part: Mapping[str, Any], metric: str, models: Sequence[str]) -> dict[str, Any]:
    change = ((part.get("paired") or {}).get("adapter-base") or {}).get("metrics", {}).get(metric)
    gain = None
    if change:
        # McNemar's test is exact where there is one.
        up, down = ("down", "up") if metric in LOWER_IS_BETTER else ("up", "down")
        p = change["mcnemar_p"] if change.get("mcnemar_p") is not None else change["p"]
        gain = {
            "text": f"{change['difference']:+.3f}",
            "range": f"{change['low']:+.3f} to {change['high']:+.3f}",
            "p": probability(p),
            # Coloured only where interval and test agree that there is a difference.
            "css": "" if p > 0.05 else up if change["low"] > 0 else down if change["high"] < 0 else "",
        }
    cells = [(part["scores"].get(model) or {}).get(metric) for model in models]
    return {
        "label": first,
        "rows": f"{_count(part):,}",
        "cells": [
            {"value": f"{cell['value']:.3f}", "range": f"{cell['low']:.3f} to {cell['high']:.3f}"} if cell else None
            for cell in cells
        ],
        "gain": gain,
    }


def _lane(name: str, part: Mapping[str, Any], metric: str, *, models: Sequence[str]) -> Lane:
    marks = []
    for model in models:
        score = (part["scores"].get(model) or {}).get(metric)
        if score:
            marks.append(Mark(model, score["value"], score["low"], score["high"]))
    count = _count(part)
    return Lane(label=name, note=f"{count:,} row{'' if count == 1 else 's'}", marks=tuple(marks))


def _count(part: Mapping[str, Any]) -> int:
    return next(iter(next(iter(part["scores"].values())).values()))["n"]


def _tag(tag: str) -> str:
    return tag.replace(",", " and ")


def _value(value: str) -> str:
    """`type=where,concepts=new` as `where · new`; the heading above says which tags."""
    pieces = value.split(",")
    return " · ".join(piece.partition("=")[2] for piece in pieces) if all("=" in piece for piece in pieces) else value


# ---------------------------------------------------------------- training


def _curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss (train and eval) and learning rate over steps; where preferences are learned how pairs are ranked and thumbs
    rewarded; where answers are sampled their reward against the score it stands for, KL, entropy and length; a resumed
    run's later line of a step wins."""
    titles = {
        "loss": ("Loss", {"train": "loss", "eval": "eval_loss"}),
        "rate": ("Learning rate", {"learning rate": "learning_rate"}),
        "probe": ("Probe set: R@1", {"probe": "probe_r@1"}),
        **{
            key: (title, {"train": key, "eval": f"eval_{key}"})
            for key, title in (
                ("preference_accuracy", "Pairs ranked rightly"),
                ("reward_margin", "Reward of the better less the worse answer"),
                ("good_reward", "Reward of good answers"),
                ("bad_reward", "Reward of bad answers"),
            )
        },
        "reward": ("Reward and true score", {"reward": "reward", "score": "score", "held-out score": "eval_score"}),
        "kl": ("KL from the base", {"KL by token": "kl"}),
        "entropy": ("Entropy of the policy", {"nats by token": "entropy"}),
        "length": ("Length of the answers", {"tokens": "answer_tokens"}),
    }
    curves = []
    for title, names in titles.values():
        series = {shown: _points(metrics, key) for shown, key in names.items()}
        curves.extend(_chart(title, series, x_label="step"))
    return curves


def _charts(charts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Further curves of report.json: `title`, `x_label`, `series` by name as [[x, y], ...]; two series at most have a
    colour of their own."""
    colours = ("train", "eval")
    found = []
    for chart in charts:
        series = {name: [(float(x), float(y)) for x, y in points] for name, points in chart["series"].items()}
        known = dict(zip(series, colours, strict=False))
        drawn = {known.get(name, name): points for name, points in series.items()}
        for one in _chart(chart["title"], drawn, x_label=chart["x_label"]):
            legend = [(name, f"s-{known.get(name, name)}") for name in series]
            found.append({**one, "series": legend if len(legend) > 1 else []})
    return found


def _chart(title: str, series: Mapping[str, Sequence[Point]], *, x_label: str) -> list[dict[str, Any]]:
    chart = line_chart(series, title=f"{title} over {x_label}s" if x_label == "step" else title, x_label=x_label)
    if not chart:
        return []
    kept = [(shown, f"s-{shown.replace(' ', '-')}") for shown, points in series.items() if points]
    return [{"title": title, "svg": Markup(chart), "series": kept if len(kept) > 1 else [], "css": ""}]


def _by_source(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    title = f"{told_of(metrics).capitalize()} by data set"
    return [{**one, "css": "many"} for one in _chart(title, source_curves(metrics), x_label="step")]


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    found = {}
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float):
            found[float(step)] = float(value)
    return sorted(found.items())


def _parts(rows: Sequence[Any]) -> dict[str, Any] | None:
    """The table of trainable parts: rows as printed in the console, or one mapping per row."""
    if not rows:
        return None
    if isinstance(rows[0], Mapping):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return {"columns": columns, "rows": [[_plain(row.get(key, "")) for key in columns] for row in rows]}
    columns = list(_PART_COLUMNS[: len(rows[0])]) + [""] * (len(rows[0]) - len(_PART_COLUMNS))
    return {"columns": columns, "rows": [[_plain(cell) for cell in row] for row in rows]}


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    training: Mapping[str, Any] = report.get("training") or {}
    kinds: dict[str, tuple[str, Callable[[Any], str]]] = {
        "steps": ("optimizer steps", lambda value: f"{value:,}"),
        "epochs": ("epochs", lambda value: f"{value:.2f}"),
        "rows": ("training rows", lambda value: f"{value:,}"),
        "rows_per_step": ("rows per step", lambda value: f"{value:,}"),
        "tokens": ("tokens seen", lambda value: f"{value:,}"),
        "seconds": ("training time", _duration),
        "samples_per_second": ("samples per second", lambda value: f"{value:.1f}"),
        "peak_memory": ("peak memory", lambda value: f"{value / 1e9:.2f} GB"),
        "trainable": ("trained parameters", lambda value: f"{value:,}"),
        "best_loss": ("best evaluation loss", lambda value: f"{value:.4f}"),
        "method": ("method", str),
        "seed": ("seed", str),
        "stopped": ("stopped early", str),
    }
    return [(text, show(training[key])) for key, (text, show) in kinds.items() if training.get(key) is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _merge(merge: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every fact of the merge and its proof as (words, value), nested ones as `proof: untouched`."""
    rows: list[tuple[str, str]] = []
    for key, value in merge.items():
        words = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows.extend(_merge(value, f"{words}: "))
        elif isinstance(value, list | tuple):
            rows.append((words, ", ".join(_plain(entry) for entry in value[:8]) + (" …" if len(value) > 8 else "")))
        elif value is not None:
            rows.append((words, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
