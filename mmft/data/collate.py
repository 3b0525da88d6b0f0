"""`[Rendered]` becomes one `Batch`: sequences padded on one side, media joined, counts taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mmft.data.pictures import Pictures
from mmft.data.render import IGNORED, Rendered

Side = Literal["right", "left"]
_KEEP_FIRST = ("aspect_ratio_mask",)
"""Masks over tiles where a padded picture must keep its first tile (mllama's own padding does)."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward.

    `inputs` go to the model as they are: input_ids and attention_mask (B, T), media tensors. `labels` (B, T) are -100
    where no loss. `supervised` counts label positions with loss after the shift, `tokens` the real tokens, `padding`
    the rest. `pictures` of the rows that have some (in the order of their places) go to the tower by themselves.
    `left_out`: rows of a stream that were bad when met: what is told of each, and whether it counts as bad or is only
    too long. `counted`: (data set, terms of the loss) of each row, in the order of the terms; () where the loss has
    none by row.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    ids: tuple[str, ...]
    supervised: int
    tokens: int
    padding: int
    pictures: tuple[Pictures, ...] = field(default=(), kw_only=True)
    counted: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)
    left_out: tuple[tuple[str, bool], ...] = field(default=(), kw_only=True)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        tensors = {name: value for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        inputs = {**self.inputs, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()}}
        return dataclasses.replace(self, inputs=inputs, labels=self.labels.to(device, non_blocking=True))


def collate(rows: Sequence[Rendered], *, pad_token_id: int, side: Side = "right") -> Batch:
    """Pad and join rows; deterministic, O(size of the result).

    Sequence-like tensors (1, T, ...) are padded with zeros like the ids. Tensors that count media on dim 0 are joined
    there; those with one entry per row too, with a zero entry for a row without media. Sizes that differ are padded
    with zeros at the end of each dimension.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    length = max(len(row.input_ids) for row in rows)
    inputs = {
        "input_ids": torch.stack([_line(row.input_ids, length, side, fill=pad_token_id) for row in rows]),
        "attention_mask": torch.stack([_line(torch.ones_like(row.input_ids), length, side, fill=0) for row in rows]),
    }
    labels = torch.stack([_line(row.labels, length, side, fill=IGNORED) for row in rows])
    names = dict.fromkeys(name for row in rows for name in row.media)
    for name in names:
        inputs[name] = _joined(name, rows, length, side)
    tokens = sum(len(row.input_ids) for row in rows)
    targets = (labels[:, 1:] != IGNORED).sum(1).tolist()
    return Batch(
        inputs=inputs,
        labels=labels,
        ids=tuple(row.id for row in rows),
        supervised=sum(targets),
        tokens=tokens,
        padding=labels.numel() - tokens,
        pictures=tuple(row.pictures for row in rows if row.pictures is not None),
        counted=tuple((row.source, count) for row, count in zip(rows, targets, strict=True)),
    )


def join_media(
    rows: Sequence[Rendered], media_rows: Sequence[int], pieces: Sequence[tuple[int, slice]]
) -> dict[str, torch.Tensor]:
    """Media of rows that stand in one line: tensors that count media joined over `media_rows`, those along the tokens
    cut and joined as `pieces` (row, stretch) says, zeros for a row that has none."""
    inputs = {}
    chosen = [rows[row] for row in media_rows]
    for name in dict.fromkeys(name for row in rows for name in row.media):
        present = [(row, row.media[name]) for row in rows if name in row.media]
        if all(_is_sequence(row, value) for row, value in present):
            model = present[0][1]
            whole = [row.media.get(name, model.new_zeros((1, len(row.input_ids), *model.shape[2:]))) for row in rows]
            inputs[name] = torch.cat([whole[row][:, part] for row, part in pieces], 1)
        elif any(name in row.per_row for row in rows):
            inputs[name] = _in_a_line([row.media[name] for row in chosen if name in row.media])
        else:
            inputs[name] = _stacked([row.media[name] for row in chosen if name in row.media])
    return inputs


def _in_a_line(values: list[torch.Tensor]) -> torch.Tensor:
    """Tensors (1, media, ...) of rows as the (1, all media, ...) of one row."""
    return _stacked([value.squeeze(0) for value in values]).unsqueeze(0)


def _line(values: torch.Tensor, length: int, side: Side, *, fill: int) -> torch.Tensor:
    """(n, ...) padded to (length, ...) on one side."""
    if len(values) == length:
        return values
    rest = values.new_full((length - len(values), *values.shape[1:]), fill)
    return torch.cat((values, rest) if side == "right" else (rest, values))


def _joined(name: str, rows: Sequence[Rendered], length: int, side: Side) -> torch.Tensor:
    present = [(row, row.media[name]) for row in rows if name in row.media]
    if all(_is_sequence(row, value) for row, value in present):
        values = [row.media.get(name) for row in rows]
        model = present[0][1]
        rest = [0] * (model.dim() - 2)
        padded = [
            _line(model.new_zeros((len(row.input_ids), *rest)) if value is None else value[0], length, side, fill=0)
            for row, value in zip(rows, values, strict=True)
        ]
        return _stacked([value.unsqueeze(0) for value in padded])
    if any(name in row.per_row for row in rows):
        model = present[0][1]
        blank = model.new_zeros((1, *([0] * (model.dim() - 1))))
        joined = _stacked([row.media.get(name, blank) for row in rows])
        if name in _KEEP_FIRST:
            joined[..., 0] = 1
        return joined
    return _stacked([value for _, value in present])


def _is_sequence(row: Rendered, value: torch.Tensor) -> bool:
    return not value.is_floating_point() and tuple(value.shape[:2]) == (1, len(row.input_ids))


def _stacked(values: list[torch.Tensor]) -> torch.Tensor:
    """Joined on dim 0; the other dimensions padded with zeros at their ends to the largest."""
    shapes = [value.shape[1:] for value in values]
    if all(shape == shapes[0] for shape in shapes):
        return torch.cat(values)
    sizes = [max(dims) for dims in zip(*shapes, strict=True)]
    out = values[0].new_zeros((sum(len(value) for value in values), *sizes))
    start = 0
    for value in values:
        out[(slice(start, start + len(value)), *(slice(0, size) for size in value.shape[1:]))] = value
        start += len(value)
    return out
