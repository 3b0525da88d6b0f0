"""Training loss (online: reward) by data set, from `loss/NAME` or `reward/NAME` and `terms/NAME` of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmft.evaluation.plots import Point

MOST_CURVES = 10
_STRETCH = 10


def told_of(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the lines tell of each data set: loss or reward."""
    return "reward" if any(key.startswith("reward/") for row in metrics for key in row) else "loss"


def source_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The loss (or reward) of each data set over steps; of many sets those with the most terms. {} for one set."""
    found = _logged(metrics)
    largest = sorted(found, key=lambda name: -sum(terms for _, _, terms in found[name]))[:MOST_CURVES]
    return {name: [(step, loss) for step, loss, _ in found[name]] for name in found if name in largest}


def source_table(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Columns and rows: data set, share of the terms of the logged steps, mean loss (or reward) over the first and the
    last tenth of its logged steps (a mean over terms)."""
    found = _logged(metrics)
    if not found:
        return None
    total = sum(terms for rows in found.values() for _, _, terms in rows)
    rows = []
    for name, logged in found.items():
        size = -(-len(logged) // _STRETCH)
        share = sum(terms for _, _, terms in logged) / total
        rows.append([name, f"{share:.1%}", f"{_mean(logged[:size]):.4f}", f"{_mean(logged[-size:]):.4f}"])
    what = told_of(metrics)
    columns = ["data set", "share of the terms", f"{what} at first", f"{what} at last"]
    return {"what": what, "columns": columns, "rows": rows}


def _mean(rows: Sequence[tuple[float, float, float]]) -> float:
    return sum(loss * terms for _, loss, terms in rows) / sum(terms for _, _, terms in rows)


def _logged(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Data set -> (step, mean, terms); a resumed run's later line of a step wins."""
    before = f"{told_of(metrics)}/"
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for row in metrics:
        for key, loss in row.items():
            name = key.removeprefix(before)
            terms = row.get(f"terms/{name}")
            if name != key and isinstance(loss, int | float) and isinstance(terms, int | float) and terms > 0:
                found.setdefault(name, {})[float(row["step"])] = (float(loss), float(terms))
    return {name: [(step, *steps[step]) for step in sorted(steps)] for name, steps in sorted(found.items())}
