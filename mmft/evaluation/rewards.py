"""Rewards of sampled answers: plain functions of one attempt, and their weighted sum.

A recipe names rewards (`exact_match`, `format:REGEX`, ...) and can run no code; a function of the user's own comes from
the command line or from Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmft.errors import DataError, NonFiniteError, RecipeError
from mmft.evaluation.metrics import find_metric
from mmft.objectives.online.rollout import Attempt, Judged
from mmft.recipe.objective.online import REWARD_METRICS

Reward = Callable[[Attempt], float]
"""Of one answer; `attempt.sample` is the row (`references`, `question`, `tags`), `attempt.text` the answer to it."""
Scorer = Callable[[Sequence[Attempt]], Sequence[float]]
_MOST_CHARACTERS = 4_000
_SECONDS = 0.25
_MOST_BOXES = 64
_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")
Box = tuple[float, float, float, float]


def by_metric(name: str) -> Reward:
    """The row's own score by a metric: `exact_match`, `token_f1`, `vqa_accuracy`."""
    metric = find_metric(name)

    def reward(attempt: Attempt) -> float:
        return float(metric.each(metric.rows([attempt.text], [attempt.sample.references]))[0])

    return reward


def by_format(pattern: str) -> Reward:
    """1 where the whole answer matches the regular expression, else 0.

    Bounded: the first 4,000 characters, a quarter of a second; RecipeError where it takes longer.
    """
    import regex  # it can be told to give up, the standard library's re cannot

    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise RecipeError(
            f"'{pattern}' is no regular expression: {error}", where="objective.rewards", do="mend the pattern"
        ) from error

    def reward(attempt: Attempt) -> float:
        try:
            return float(compiled.fullmatch(attempt.text[:_MOST_CHARACTERS], timeout=_SECONDS) is not None)
        except TimeoutError as error:
            raise RecipeError(
                f"'{pattern}' needs more than {_SECONDS} s on one answer",
                where="objective.rewards",
                do="write it without nested repetitions",
            ) from error

    return reward


def boxes(text: str) -> list[Box]:
    """The boxes `[x1, y1, x2, y2]` of a text, at most 64, with their corners in order."""
    found = []
    for match in _BOX.finditer(text[:_MOST_CHARACTERS]):
        x1, y1, x2, y2 = (float(value) for value in match.groups())
        found.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return found[:_MOST_BOXES]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    inner = max(width, 0.0) * max(height, 0.0)
    outer = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - inner
    return inner / outer if outer > 0 else 0.0


def iou(attempt: Attempt) -> float:
    """Boxes of the answer against those of the best reference: the sum of IoU over pairs, largest first, by the larger
    number of boxes (so one too many costs as much as one that is missing); 1 where neither has any."""
    given = boxes(attempt.text)
    return max((_matched(given, boxes(reference)) for reference in attempt.sample.references), default=0.0)


def _matched(given: list[Box], wanted: list[Box]) -> float:
    if not given and not wanted:
        return 1.0
    pairs = sorted(
        ((overlap(one, other), i, j) for i, one in enumerate(given) for j, other in enumerate(wanted)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    left, right, total = set(range(len(given))), set(range(len(wanted))), 0.0
    for value, i, j in pairs:
        if i in left and j in right:
            left.discard(i)
            right.discard(j)
            total += value
    return total / max(len(given), len(wanted))


def by_length(longest: int) -> Reward:
    """Minus the answer's tokens as a share of the longest answer allowed."""
    return lambda attempt: -attempt.tokens / longest


def unfinished(attempt: Attempt) -> float:
    """-1 for an answer that was cut at the longest length, else 0."""
    return 0.0 if attempt.ended else -1.0


def one_by_one(reward: Reward) -> Scorer:
    """A reward of single answers as one of many."""
    return lambda attempts: [reward(attempt) for attempt in attempts]


def find_reward(name: str, *, longest: int, device: Any = "cpu") -> Scorer:
    """The reward a recipe names; a reward model is read onto `device`."""
    kind, _, given = name.partition(":")
    if kind == "reward_model":
        from mmft.evaluation.model_rewards import by_model

        return by_model(given, device=device)
    if kind in REWARD_METRICS:
        return one_by_one(by_metric(kind))
    plain: Mapping[str, Reward] = {"iou": iou, "length": by_length(longest), "unfinished": unfinished}
    if kind in plain:
        return one_by_one(plain[kind])
    return one_by_one(by_format(given))


class WeightedRewards:
    """The judge of a run: a weighted sum of rewards, and beside it the score that rewards stand for."""

    def __init__(self, terms: Mapping[str, tuple[float, Scorer]], *, true: Reward) -> None:
        self.terms = dict(terms)
        self.true = true
        self.names = tuple(self.terms)

    def __call__(self, attempts: Sequence[Attempt]) -> Judged:
        """Raises DataError naming the sample for which a reward function raised or gave no number, NonFiniteError for
        one that is NaN or infinite."""
        parts = {
            name: torch.tensor(_asked(name, scorer, attempts), dtype=torch.float32)
            for name, (_, scorer) in self.terms.items()
        }
        total = torch.zeros(len(attempts))
        for name, (weight, _) in self.terms.items():
            total = total + weight * parts[name]
        true = _asked("score", one_by_one(self.true), attempts)
        return Judged(total, torch.tensor(true, dtype=torch.float32), parts)


def _asked(name: str, scorer: Scorer, attempts: Sequence[Attempt]) -> list[float]:
    try:
        given: Sequence[Any] = list(scorer(attempts))
    except RecipeError:
        raise
    except Exception as error:
        raise _blamed(name, scorer, attempts, error) from error
    if len(given) != len(attempts):
        raise DataError(f"reward '{name}' gave {len(given)} values for {len(attempts)} answers", do="mend it")
    found = []
    for attempt, value in zip(attempts, given, strict=True):
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"reward '{name}' gave {value!r}", where=_where(attempt), allowed="a number", do="mend it"
            ) from error
        if not math.isfinite(number):
            raise NonFiniteError(
                f"reward '{name}' is {number}", where=_where(attempt), allowed="a finite number", do="mend it"
            )
        found.append(number)
    return found


def _blamed(name: str, scorer: Scorer, attempts: Sequence[Attempt], error: Exception) -> DataError:
    """The error with the first answer for which the reward raises."""
    where = "the whole batch"
    for attempt in attempts:
        try:
            scorer([attempt])
        except Exception:
            where = _where(attempt)
            break
    return DataError(f"reward '{name}' raised {type(error).__name__}: {error}", where=where, do="mend it")


def _where(attempt: Attempt) -> str:
    return f"sample {attempt.sample.id} ({attempt.sample.where or attempt.sample.source}), answer {attempt.text[:80]!r}"
