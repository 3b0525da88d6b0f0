"""What a run found, in words and in one small table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "exact_match": "exact match",
    "vqa_accuracy": "VQA accuracy",
    "token_f1": "token F1",
    "cider": "CIDEr",
    "bleu": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "ece": "calibration error",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
    "win_rate": "win rate over the base",
}

LOWER_IS_BETTER = ("log_loss", "ece", "mae", "rmse")


def label(metric: str) -> str:
    """A metric's name as people write it."""
    return LABELS.get(metric, metric.replace("_", " "))


def agreement(records: Sequence[Mapping[str, Any]], first: str, second: str) -> tuple[int, int]:
    """(rows on which both gave the same text, rows both answered)."""
    both = [row["answers"] for row in records if first in row["answers"] and second in row["answers"]]
    return sum(answers[first] == answers[second] for answers in both), len(both)


def verdict(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]] = ()) -> str:
    """One sentence: what the adapter did to the headline metric of the first set, and whether merging kept it."""
    scores: Mapping[str, Any] = report.get("scores") or {}
    if not scores:
        return "This run was trained but not evaluated."
    first = next(iter(report.get("sets") or {}), "")
    metric = next(iter(next(iter(scores.values()))))
    paired = ((report.get("sets") or {}).get(first) or {}).get("paired") or {}
    same, asked = agreement([row for row in records if row["set"] == first], "merged", "adapter")
    change = paired.get("adapter-base")
    if change is None:
        parts = [f"the {name} model reached {_score(values[metric])}" for name, values in scores.items()]
        return _sentence(f"On {_rows(scores, metric, first)}, " + " and ".join(parts) + f" {label(metric)}")
    before, after = scores["base"][metric]["value"], scores["adapter"][metric]["value"]
    bounds = f"95 % interval {change['low']:+.2f} to {change['high']:+.2f}"
    numbers = f"from {before:.2f} to {after:.2f} ({change['difference']:+.2f}, {bounds})"
    if change["low"] > 0:
        text = f"The adapter raised {label(metric)} {numbers}"
    elif change["high"] < 0:
        text = f"The adapter lowered {label(metric)} {numbers}"
    else:
        text = f"The adapter made no clear difference: {label(metric)} went {numbers}"
    text += f" on {_rows(scores, metric, first)}"
    return _sentence(text + _merged(same, asked))


def _merged(same: int, asked: int) -> str:
    if not asked:
        return ""
    if same == asked:
        return f", and the merged model gives the same answers ({same:,} of {asked:,})"
    return f", but the merged model answers {asked - same:,} of {asked:,} rows differently from the adapter"


def _rows(scores: Mapping[str, Any], metric: str, name: str) -> str:
    count = next(iter(scores.values()))[metric]["n"]
    return f"{count:,} row{'' if count == 1 else 's'} of {name}" if name else f"{count:,} rows"


def _score(entry: Mapping[str, Any]) -> str:
    return f"{entry['value']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def probability(value: float | None) -> str:
    """A p-value in words: `p = 0.03`, `p < 0.001`."""
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
