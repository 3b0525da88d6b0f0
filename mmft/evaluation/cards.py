"""The samples a person should look at: those whose answer the adapter changed, with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmft.data.media import open_image
from mmft.data.sample import MediaRef
from mmft.errors import DataError
from mmft.evaluation.metrics import METRICS

SIDE = 192
_PICTURES_PER_CARD = 4
_TEXT = 600
_CORPUS_METRICS = ("bleu", "bleu_1", "bleu_2", "bleu_3", "cider", "meteor")
_MAX_PIXELS = 40_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer and how right it is: `right` (1), `partly`, `wrong` (0)."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Card:
    """One sample as the page shows it. `kind` is `gained`, `lost` or `still wrong`."""

    id: str
    set: str
    kind: str
    question: str
    references: tuple[str, ...]
    answers: tuple[Answer, ...]
    tags: tuple[str, ...]
    pictures: tuple[str, ...]
    lost_pictures: int


class Pictures:
    """Pictures as small JPEG data URIs, until `budget` characters are spent."""

    def __init__(self, folder: Path, *, budget: int = 1_900_000) -> None:
        self.folder = folder
        self.left = budget

    def uri(self, name: str) -> str | None:
        """`data:image/jpeg;base64,…` of at most 192 px, or None when the file is gone, broken, or the page is full."""
        path = Path(name)
        ref = (
            MediaRef(path=path.name, root=path.parent) if path.is_absolute() else MediaRef(path=name, root=self.folder)
        )
        try:
            image = open_image(ref, max_pixels=_MAX_PIXELS)
        except (DataError, OSError):
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=82, optimize=True)
        text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(text) > self.left:
            return None
        self.left -= len(text)
        return text


def changed_cards(
    records: Sequence[Mapping[str, Any]], metric: str, *, folder: Path, limit: int = 20
) -> tuple[list[Card], list[Card]]:
    """(worst, best) samples whose adapter answer differs from the base's.

    Best: the score rose, largest rise first. Worst: the score fell, largest fall first, then answers that changed and
    are as bad as before (score below 1). Ties are broken by token F1, then by id, so the page is the same each time.
    BLEU and CIDEr say little about one short text, and a retrieval score nothing: token F1 stands in for them.
    """
    metric = "token_f1" if metric in _CORPUS_METRICS or metric not in METRICS else metric
    rows = [row for row in records if "base" in row["answers"] and "adapter" in row["answers"]]
    if not rows:
        return [], []
    scores = {model: _row_scores(rows, model, metric) for model in ("base", "adapter")}
    words = {model: _row_scores(rows, model, "token_f1") for model in ("base", "adapter")}
    gain = scores["adapter"] - scores["base"]
    word_gain = words["adapter"] - words["base"]
    places = [place for place, row in enumerate(rows) if row["answers"]["base"] != row["answers"]["adapter"]]
    best = [place for place in places if gain[place] > 0]
    worst = [place for place in places if gain[place] < 0 or (gain[place] == 0 and scores["adapter"][place] < 1)]
    best.sort(key=lambda place: (-gain[place], -word_gain[place], rows[place]["id"]))
    worst.sort(key=lambda place: (gain[place], word_gain[place], scores["adapter"][place], rows[place]["id"]))
    pictures = Pictures(folder)

    def cards(chosen: Sequence[int]) -> list[Card]:
        return [_card(rows[place], float(gain[place]), metric, pictures) for place in chosen[:limit]]

    return cards(worst), cards(best)


def _row_scores(rows: Sequence[Mapping[str, Any]], model: str, metric: str) -> np.ndarray:
    scorer = METRICS[metric]
    return scorer.each(scorer.rows([row["answers"][model] for row in rows], [row["references"] for row in rows]))


def _card(row: Mapping[str, Any], gain: float, metric: str, pictures: Pictures) -> Card:
    uris = [pictures.uri(name) for name in row["images"][:_PICTURES_PER_CARD]]
    scorer = METRICS[metric]
    answers = []
    for model, text in row["answers"].items():
        value = float(scorer.each(scorer.rows([text], [row["references"]]))[0])
        grade = "right" if value >= 1 - 1e-6 else "wrong" if value <= 1e-6 else "partly"
        answers.append(Answer(model, clip(text) or "(nothing)", grade))
    return Card(
        id=row["id"],
        set=row["set"],
        kind="gained" if gain > 0 else "lost" if gain < 0 else "still wrong",
        question=clip(row["question"]),
        references=tuple(clip(text) for text in dict.fromkeys(row["references"])),
        answers=tuple(answers),
        tags=tuple(f"{name}: {value}" for name, value in row["tags"].items()),
        pictures=tuple(uri for uri in uris if uri is not None),
        lost_pictures=sum(uri is None for uri in uris),
    )


def clip(text: str, limit: int = _TEXT) -> str:
    """At most `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
