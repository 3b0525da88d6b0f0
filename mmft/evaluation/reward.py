"""How good a reward model is: does it rank answers rightly, is its certainty earned, does it reward mere length.

For every two answers of a row with rewards r_w (better) and r_l: accuracy is the share with r_w > r_l. `s(r_w - r_l)`
is the probability the model gives to the better one; its certainty `max(p, 1 - p)` is compared with how often it is
right in ten bins (expected calibration error, Guo et al. 2017). Length: the correlation of an answer's reward with its
number of tokens, within rows (both less their row's mean).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mmft.evaluation.scores import score_values

HEADLINE = "preference_accuracy"
BINS = 10


@dataclass(frozen=True)
class Judged:
    """Rewards and lengths of each row's answers, best first."""

    rewards: list[list[float]]
    lengths: list[list[int]]

    def gaps(self) -> list[np.ndarray]:
        """Of each row, better less worse for every two answers."""
        return [np.array([a - b for a, b in combinations(row, 2)]) for row in self.rewards]


def calibration_error(gaps: np.ndarray) -> float:
    """`sum over bins of n_b/n |right share - mean certainty|`, bins of equal width from 0.5 to 1."""
    return float(sum(abs(row["right"] - row["certainty"]) * row["pairs"] for row in reliability(gaps)) / len(gaps))


def reliability(gaps: np.ndarray) -> list[dict[str, float]]:
    """Of each bin of certainty that holds pairs: how many, mean certainty, share that is right (a tie is half)."""
    certainty = 1.0 / (1.0 + np.exp(-np.abs(np.clip(gaps, -700, 700))))
    right = np.where(gaps > 0, 1.0, np.where(gaps < 0, 0.0, 0.5))
    place = np.minimum(((certainty - 0.5) * 2 * BINS).astype(int), BINS - 1)
    found = []
    for number in range(BINS):
        inside = place == number
        if inside.any():
            mean, share = float(certainty[inside].mean()), float(right[inside].mean())
            found.append({"pairs": int(inside.sum()), "certainty": mean, "right": share})
    return found


def length_correlation(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> float:
    """Pearson's correlation of reward and length, both less their row's mean; 0 where one of them never varies."""
    r = np.concatenate([np.subtract(row, np.mean(row)) for row in rewards])
    n = np.concatenate([np.subtract(row, np.mean(row)) for row in lengths])
    scale = float(np.sqrt((r**2).sum() * (n**2).sum()))
    return float((r * n).sum() / scale) if scale > 0 else 0.0


def score_rewards(
    found: Mapping[str, Mapping[str, Judged]],
    tags: Mapping[str, Sequence[Mapping[str, str]]],
    *,
    group_by: Sequence[str] = (),
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`headline`, `scores`, `sets` and `charts` of the report from `found[MODEL][SET]`; each set also has
    `reliability`."""
    sets: dict[str, Any] = {}
    for name in next(iter(found.values())):
        judged = {model: one[name] for model, one in found.items()}
        values = {model: _columns(one) for model, one in judged.items()}
        entry = score_values(
            name, values, tags[name], group_by=group_by, bootstrap_samples=bootstrap_samples, seed=seed
        )
        for model, one in judged.items():
            entry["scores"][model] |= _whole(one, resamples=min(bootstrap_samples, 500), seed=seed)
        entry["reliability"] = {model: reliability(np.concatenate(one.gaps())) for model, one in judged.items()}
        sets[name] = entry
    charts = [_chart(name, entry["reliability"]) for name, entry in sets.items()]
    return {"headline": HEADLINE, "scores": next(iter(sets.values()))["scores"], "sets": sets, "charts": charts}


def _chart(name: str, reliability: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The trained model's share of right pairs over how sure it was of them (of the base where it is alone)."""
    which = next((model for model in ("adapter", "merged") if model in reliability), next(iter(reliability)))
    bins = [[row["certainty"], row["right"]] for row in reliability[which]]
    series = {which: bins, "as often right as sure": [[0.5, 0.5], [1.0, 1.0]]}
    return {"title": f"Pairs of {name} ranked rightly over certainty", "x_label": "certainty", "series": series}


def _columns(judged: Judged) -> dict[str, np.ndarray]:
    gaps = judged.gaps()
    return {
        HEADLINE: np.array([float((row > 0).mean()) for row in gaps]),
        "reward_margin": np.array([float(row.mean()) for row in gaps]),
    }


def _whole(judged: Judged, *, resamples: int, seed: int) -> dict[str, dict[str, float]]:
    """Scores of a set that are no means over rows, with percentile intervals over rows."""
    gaps, rows = judged.gaps(), len(judged.rewards)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, rows, size=(resamples, rows))
    kinds: dict[str, Callable[[Sequence[int]], float]] = {
        "ece": lambda at: calibration_error(np.concatenate([gaps[i] for i in at])),
        "length_correlation": lambda at: length_correlation(
            [judged.rewards[i] for i in at], [judged.lengths[i] for i in at]
        ),
    }
    out = {}
    for name, kind in kinds.items():
        low, high = np.percentile([kind(draw) for draw in draws], (2.5, 97.5))
        out[name] = {"value": kind(range(rows)), "low": float(low), "high": float(high), "n": rows}
    return out
