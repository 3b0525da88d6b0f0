"""Batches of answers made by hand, and small projects with preferences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.data.dialects import RowContext
from mmft.data.preference import parse_preference
from mmft.data.preference_render import PreferenceBatch, PreferenceRenderer
from mmft.data.render import Renderer
from mmft.data.sample import Sample
from tests.tiny import COLOURS, tiny_processor, tiny_rows

OTHER = {"red": "green", "green": "blue", "blue": "white", "white": "red"}


def fixed_batch(ids: torch.Tensor, mask: torch.Tensor, *, good: Sequence[int] = ()) -> PreferenceBatch:
    """Rows (first answers, then second) whose loss stands where `mask` is 1."""
    rows, width = ids.shape
    places = [(r, t) for r in range(rows) for t in range(1, width) if mask[r, t]]
    half = rows // 2
    score = torch.tensor([*map(float, good)] + [0.0] * (rows - len(good)))
    return PreferenceBatch(
        inputs={"input_ids": ids},
        labels=ids.masked_fill(mask == 0, -100),
        ids=tuple(map(str, range(half))),
        supervised=len(places),
        tokens=ids.numel(),
        padding=0,
        owner=torch.arange(half).repeat(2),
        rank=torch.arange(rows) // half,
        score=score,
        at=torch.tensor([r * width + t - 1 for r, t in places]),
        target=torch.tensor([int(ids[r, t]) for r, t in places]),
        row=torch.tensor([r for r, _ in places]),
        last=torch.tensor([r * width + max(t for s, t in places if s == r) for r in range(rows)]),
        keys=tuple(range(rows)),
    )


def preference_rows(folder: Path, n: int = 8, seed: int = 0, **more: Any) -> Path:
    """`tiny_rows` as pairs: the true colour against another one."""
    path = tiny_rows(folder, n, seed=seed)
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        answer = row["messages"][-1]["content"]
        extra = {key: value(answer) if callable(value) else value for key, value in more.items()}
        made = {**row, "prompt": row["messages"][:-1], "chosen": answer, "rejected": OTHER[answer], **extra}
        del made["messages"]
        rows.append(made)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_preferences(folder: Path, n: int = 3) -> list[Sample]:
    """The same as samples."""
    path = preference_rows(folder, n)
    context = RowContext("tiny", path.parent, {}, None)
    lines = path.read_text().splitlines()
    return [parse_preference(json.loads(line), f"row {i}", i, context) for i, line in enumerate(lines, 1)]


def tiny_renderer(kind: str = "llava", **how: Any) -> PreferenceRenderer:
    """With the processor of a tiny model."""
    chat = Renderer(tiny_processor(kind), max_length=256, supervise="last_answer")
    return PreferenceRenderer(chat, **how)


assert OTHER.keys() == COLOURS.keys()
