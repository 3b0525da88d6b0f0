"""What a data set holds, before it is trained on: token counts, rows that will be dropped, a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmft.data.lengths import lengths_of
from mmft.data.media import media_digest
from mmft.data.render import IGNORED, Renderer
from mmft.data.sample import MediaRef, Sample

_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


@dataclass(frozen=True)
class Audit:
    """Counts of a data set.

    `lengths` holds for `total`, `text`, `media` and `supervised` tokens the mean, min, p50, p90, p99 and max over the
    `measured` rows. `dropped` are the ids (of all rows) that `over_length: drop` leaves out. `unstopped` counts
    measured rows whose last trained token is no special token: a model trained on them does not learn where to stop.
    """

    rows: int
    media: int
    sources: Mapping[str, int]
    measured: int
    lengths: Mapping[str, Mapping[str, float]]
    dropped: tuple[str, ...]
    unstopped: int
    fingerprint: str


def audit(samples: Sequence[Sample], renderer: Renderer, *, limit: int | None = None) -> Audit:
    """Measure up to `limit` evenly spaced rows by rendering them (all if None) and fingerprint all rows.

    With `over_length: drop` every row's length is taken too (no picture is decoded for that). Raises the DataError of
    a row that cannot be rendered. Price: a render per measured row, a sha256 per picture.
    """
    dropped: tuple[str, ...] = ()
    kept = samples
    if renderer.over_length == "drop":
        fits = [length <= renderer.max_length for length in lengths_of(renderer, samples)]
        dropped = tuple(sample.id for sample, fit in zip(samples, fits, strict=True) if not fit)
        kept = [sample for sample, fit in zip(samples, fits, strict=True) if fit]
    measured = _spaced(kept, limit)
    special = set(renderer.tokenizer.all_special_ids) | set(renderer.tokenizer.get_added_vocab().values())
    counts: dict[str, list[int]] = {"total": [], "text": [], "media": [], "supervised": []}
    unstopped = 0
    for sample in measured:
        rendered = renderer.render(sample)
        trained = rendered.labels[rendered.labels != IGNORED]
        counts["total"].append(len(rendered.input_ids))
        counts["text"].append(rendered.text_tokens)
        counts["media"].append(rendered.media_tokens)
        counts["supervised"].append(len(trained))
        unstopped += int(trained[-1]) not in special
    return Audit(
        rows=len(samples),
        media=sum(len(sample.media) for sample in samples),
        sources=dict(Counter(sample.source for sample in samples)),
        measured=len(measured),
        lengths={name: _spread(values) for name, values in counts.items()},
        dropped=dropped,
        unstopped=unstopped,
        fingerprint=fingerprint(samples),
    )


def fingerprint(samples: Iterable[Sample]) -> str:
    """sha256 over ids, turns, references, tags, cells and the content of the media, in order; not over where files
    lie."""
    digest = hashlib.sha256()
    known: dict[MediaRef, str] = {}

    def content(ref: MediaRef) -> str:
        if ref not in known:
            known[ref] = media_digest(ref)
        return known[ref]

    for sample in samples:
        turns = [[turn.role, [[piece.kind, piece.text] for piece in turn.pieces]] for turn in sample.turns]
        media = [content(ref) for ref in sample.media]
        row: list[Any] = [sample.id, sample.source, turns, media, list(sample.answers), sorted(sample.tags.items())]
        row += [list(sample.negatives)] if sample.negatives else []
        row += [
            [one.text, one.score, one.good, None if one.media is None else [content(ref) for ref in one.media]]
            for one in sample.candidates
        ]
        if sample.cells:
            row.append(
                [
                    [name, cell.kind, cell.value.kind if isinstance(cell.value, MediaRef) else cell.value]
                    for name, cell in sample.cells.items()
                ]
            )
        digest.update(_ENCODER.encode(row).encode() + b"\n")
    return digest.hexdigest()


def _spaced(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // limit] for index in range(limit)]


def _spread(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, (50, 90, 99), method="inverted_cdf")
    return {
        "mean": float(np.mean(values)),
        "min": float(min(values)),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(max(values)),
    }
