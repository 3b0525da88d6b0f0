"""Rows behind one another instead of padding: which rows of a step share a forward, and the batch they become.

The rows of an optimizer step stay those of the plain plan; they are only dealt out to other forwards. The loss of a
step is one sum over its rows divided by one count, so the step is the same step. All of it is a function of
(seed, step, lengths): nothing is kept between steps, and a run resumes by its step number alone.

    packs:   first-fit-decreasing (Johnson 1973) under a budget of tokens and pictures; a forward is one line of rows
    buckets: rows sorted by length, cut into forwards of `micro_batch` rows; a forward is padded as ever

The budget is what the plain plan's worst forward may hold: `micro_batch` times the longest row (and the most pictures
of a row), so packing asks for no more memory. Price of planning: O(rows of a step * packs) per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from mmft.data.collate import Batch, join_media
from mmft.data.lengths import row_lengths
from mmft.data.order import MicroBatch, StepPlan
from mmft.data.render import IGNORED, Rendered, Renderer
from mmft.data.sample import MediaRef, Sample

Seen = tuple[int, int]
Layout = Literal["packs", "buckets"]
Positions = Callable[[Rendered], torch.Tensor]
_KEPT_STEPS = 4
MULTIPLE = 8
"""Tokens of a line: matrix products of odd lengths run at 60 to 90 % of the speed."""


def first_fit_decreasing(sizes: Sequence[tuple[int, int]], limits: tuple[int, int]) -> list[list[int]]:
    """Indices of `sizes` (tokens, pictures) in bins that keep within both limits; an item beyond them is alone.

    Longest first, each into the first bin with room; equal ones in their order. Bins and their items come back in the
    order of the items.
    """
    order = sorted(range(len(sizes)), key=lambda at: (-sizes[at][0], at))
    bins: list[list[int]] = []
    used: list[tuple[int, int]] = []
    for at in order:
        tokens, media = sizes[at]
        for number, (one, two) in enumerate(used):
            if one + tokens <= limits[0] and two + media <= limits[1]:
                bins[number].append(at)
                used[number] = (one + tokens, two + media)
                break
        else:
            bins.append([at])
            used.append((tokens, media))
    return sorted(sorted(one) for one in bins)


@dataclass(frozen=True)
class RowSizes:
    """Per row of the data: tokens, pictures, tokens of its pictures, and which rows show the same ones (`shown`: equal
    numbers, -1 for a row without); int64 arrays of one length."""

    tokens: np.ndarray
    media: np.ndarray
    media_tokens: np.ndarray
    shown: np.ndarray


def shown_alike(media: Sequence[tuple[MediaRef, ...]]) -> np.ndarray:
    """Numbers that are equal for rows with the same pictures in the same order, -1 for a row without any."""
    known: dict[tuple[MediaRef, ...], int] = {}
    return np.array([known.setdefault(refs, len(known)) if refs else -1 for refs in media], dtype=np.int64)


def row_sizes(renderer: Renderer, samples: Sequence[Sample], *, only: Sequence[int] | None = None) -> RowSizes:
    """Sizes of all rows (of the rows `only`, zeros elsewhere), as the renderer counts them without opening a picture;
    a row that will be cut counts `max_length`."""
    tokens, media = np.zeros(len(samples), np.int64), np.zeros(len(samples), np.int64)
    rows = np.arange(len(samples)) if only is None else np.asarray(only, np.int64)
    found = row_lengths(renderer, [samples[row] for row in rows])
    tokens[rows], media[rows] = np.minimum(found[:, 0], renderer.max_length), found[:, 1]
    count = np.array([len(sample.media) for sample in samples], np.int64)
    return RowSizes(tokens, count, media, shown_alike([sample.media for sample in samples]))


@dataclass(frozen=True, eq=False)
class PackPlan(StepPlan):
    """A `StepPlan` whose forwards hold other rows of the same step; a step may have fewer of them, and then the last
    ones are empty. With `share` rows that show the same pictures lie in one forward where the budget lets them, counted
    with their pictures once."""

    sizes: RowSizes | None = None
    layout: Layout = "packs"
    share: bool = False
    _kept: dict[int, list[tuple[Seen, ...]]] = field(default_factory=dict, repr=False, init=False)

    @classmethod
    def of(cls, plan: StepPlan, sizes: RowSizes, *, layout: Layout, share: bool = False) -> PackPlan:
        """The plan with its rows dealt out again."""
        names = ("rows", "micro_batch", "micro_per_step", "world", "seed", "mixture", "together")
        return cls(**{name: getattr(plan, name) for name in names}, sizes=sizes, layout=layout, share=share)

    def micro_batch_at(self, step: int, index: int) -> MicroBatch:
        """Forward `index` (over all ranks) of `step`; its rows are empty where the step has fewer forwards."""
        packs = self.packs(step)
        return MicroBatch(step, index, packs[index] if index < len(packs) else ())

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """The forwards of `step` that `rank` computes."""
        return [micro for micro in super().micro_batches(step, rank) if micro.rows]

    def packs(self, step: int) -> list[tuple[Seen, ...]]:
        """(row, epoch) of every forward of a step: a multiple of `world` of them, no more than the plain plan's."""
        if step not in self._kept:
            while len(self._kept) >= _KEPT_STEPS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[step] = self._dealt(self.step_rows(step))
        return self._kept[step]

    @property
    def limits(self) -> tuple[int, int]:
        """Tokens and pictures that a forward may hold."""
        sizes = self._sizes
        return self.micro_batch * int(sizes.tokens.max()), self.micro_batch * max(1, int(sizes.media.max()))

    @property
    def _sizes(self) -> RowSizes:
        assert self.sizes is not None
        return self.sizes

    def _dealt(self, rows: Sequence[Seen]) -> list[tuple[Seen, ...]]:
        size = self.micro_batch
        if self.layout == "buckets":
            rows = sorted(rows, key=lambda seen: -int(self._sizes.tokens[seen[0]]))
            return [tuple(rows[at : at + size]) for at in range(0, len(rows), size)]
        items = self._items(rows)
        bins = first_fit_decreasing([self.size_of(item) for item in items], self.limits)
        packs = [[seen for at in one for seen in items[at]] for one in bins]
        while len(packs) % self.world:
            longest = max((one for one in packs if len(one) > 1), key=lambda one: self.size_of(one)[0])
            half = len(longest) // 2
            packs[packs.index(longest)] = longest[:half]
            packs.append(longest[half:])
        if len(packs) > self.micro_per_step:  # first-fit may need more bins than the order as it is
            packs = [list(rows[at : at + size]) for at in range(0, len(rows), size)]
        return [tuple(one) for one in packs]

    def _items(self, rows: Sequence[Seen]) -> list[list[Seen]]:
        """What is packed: rows, or with `share` the rows of one picture, as many as a forward holds."""
        if not self.share:
            return [[seen] for seen in rows]
        tokens, media = self.limits
        items: list[list[Seen]] = []
        open_items: dict[int, list[Seen]] = {}
        for seen in rows:
            shown = int(self._sizes.shown[seen[0]])
            item = open_items.get(shown) if shown >= 0 else None
            if item is not None:
                size = self.size_of([*item, seen])
                if size[0] <= tokens and size[1] <= media:
                    item.append(seen)
                    continue
            item = [seen]
            items.append(item)
            open_items[shown] = item
        return items

    def size_of(self, item: Sequence[Seen]) -> tuple[int, int]:
        """Tokens and pictures of rows in one forward, those that are shared counted once."""
        sizes, known = self._sizes, set()
        tokens = media = 0
        for row, _ in item:
            shown = int(sizes.shown[row])
            again = self.share and shown in known
            tokens += int(sizes.tokens[row]) - (int(sizes.media_tokens[row]) if again else 0)
            media += 0 if again else int(sizes.media[row])
            known |= {shown} if shown >= 0 else set()
        return tokens, media


def plain_positions(row: Rendered) -> torch.Tensor:
    """Positions 0, 1, 2, … of a row's tokens, int64 (T,)."""
    return torch.arange(len(row.input_ids))


@dataclass(frozen=True)
class Segment:
    """Tokens of a line that see themselves (causally) and `before`, a stretch that came earlier: (start, end)."""

    start: int
    end: int
    before: tuple[int, int] = (0, 0)


def pack(
    rows: Sequence[Rendered],
    *,
    positions: Positions = plain_positions,
    shown: Sequence[int] | None = None,
    media_ids: torch.Tensor | None = None,
    multiple: int = 1,
) -> Batch:
    """One line of all rows: input_ids (1, T), position_ids that start again with every row (1, T) or (3, 1, T),
    `attention_mask` the table of segments (1, 1, n, 4) int64 of (start, end, start of before, end of before).

    The first label of a row is no target (no token of it comes before). With `shown` (equal numbers: the same pictures)
    and the ids of picture tokens, rows of the same pictures become [beginning | rest 1 | rest 2 …]: the longest common
    beginning that holds all their pictures and no target, computed once; every rest sees it and itself, and its
    positions go on from it. `tokens` counts the tokens of the rows as if each stood alone. A line that is no `multiple`
    of tokens long is filled up with copies of its last token, which nothing sees and which are no target, unless that
    token stands for a picture.
    """
    if not rows:
        raise ValueError("a pack needs at least one row")
    pieces: list[tuple[int, slice]] = []  # (row, which of its tokens)
    segments: list[Segment] = []
    media_rows: list[int] = []
    at = 0

    def put(row: int, begin: int, end: int, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        nonlocal at
        pieces.append((row, slice(begin, end)))
        segments.append(Segment(at, at + end - begin, before))
        at += end - begin
        return at - (end - begin), at

    for group in _groups(shown, len(rows)):
        common = _common(rows, group, media_ids) if len(group) > 1 and media_ids is not None else 0
        if common:
            media_rows.append(group[0])
            before = put(group[0], 0, common)
            for row in group:
                put(row, common, len(rows[row].input_ids), before)
        else:
            media_rows += group
            for row in group:
                put(row, 0, len(rows[row].input_ids))
    last, spare = pieces[-1][0], -at % multiple
    end = len(rows[last].input_ids)
    if spare and not (media_ids is not None and bool(torch.isin(rows[last].input_ids[-1], media_ids))):
        pieces += [(last, slice(end - 1, end))] * spare
        segments[-1] = replace(segments[-1], end=at + spare)
    else:
        spare = 0
    return _line(rows, pieces, segments, media_rows, positions, spare)


def _groups(shown: Sequence[int] | None, count: int) -> list[list[int]]:
    """Rows by what they show, in the order of their first."""
    if shown is None:
        return [[row] for row in range(count)]
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(shown):
        groups.setdefault(number if number >= 0 else -1 - row, []).append(row)
    return list(groups.values())


def _common(rows: Sequence[Rendered], group: Sequence[int], media_ids: torch.Tensor) -> int:
    """Length of the beginning that the rows of a group share; 0 where sharing it would change a number."""
    first = rows[group[0]].input_ids
    length = len(first)
    for row in group:
        ids, labels = rows[row].input_ids, rows[row].labels
        targets = (labels[1:] != IGNORED).nonzero()
        # The token before a target has to lie in the rest, and so has at least one token.
        length = min(length, len(ids) - 1, int(targets[0]) if len(targets) else len(ids) - 1)
        differs = (ids[:length] != first[:length]).nonzero()
        length = int(differs[0]) if len(differs) else length
    seen = [bool(torch.isin(rows[row].input_ids[length:], media_ids).any()) for row in group]
    return 0 if any(seen) else length


def _line(
    rows: Sequence[Rendered],
    pieces: Sequence[tuple[int, slice]],
    segments: Sequence[Segment],
    media_rows: Sequence[int],
    positions: Positions,
    spare: int,
) -> Batch:
    def line(values: Sequence[torch.Tensor]) -> torch.Tensor:
        """(…, T) of every row -> (…, T of the line)."""
        return torch.cat([values[row][..., part] for row, part in pieces], -1)

    labels = []
    for row in rows:
        own = row.labels.clone()
        own[0] = IGNORED
        labels.append(own)
    places = line([positions(row) for row in rows])
    table = [[one.start, one.end, *one.before] for one in segments]
    inputs = {
        "input_ids": line([row.input_ids for row in rows])[None],
        "attention_mask": torch.tensor(table, dtype=torch.int64)[None, None],
        "position_ids": places[None] if places.dim() == 1 else places[:, None],
    }
    inputs |= join_media(rows, media_rows, pieces)
    targets = line(labels)[None]
    if spare:
        targets[:, -spare:] = IGNORED
    return Batch(
        inputs=inputs,
        labels=targets,
        ids=tuple(row.id for row in rows),
        supervised=int((targets[:, 1:] != IGNORED).sum()),
        tokens=sum(len(row.input_ids) for row in rows),
        padding=spare,
        pictures=tuple(found for row in media_rows if (found := rows[row].pictures) is not None),
        counted=tuple(
            (rows[row].source, int((own != IGNORED).sum()))
            for (row, _), own in zip(
                pieces, targets[0].split([part.stop - part.start for _, part in pieces]), strict=True
            )
        ),
    )


class PackedRenderer:
    """A renderer whose batches are lines of rows; it is copied to loader workers."""

    def __init__(self, inner: Renderer, positions: Positions = plain_positions, *, share: bool = False) -> None:
        self.inner, self.positions, self.share = inner, positions, share
        self.max_length, self.over_length = inner.max_length, inner.over_length

    def sharing(self) -> PackedRenderer:
        """The same with shared beginnings."""
        return PackedRenderer(self.inner, self.positions, share=True)

    def length(self, sample: Sample) -> int:
        """Tokens of a row."""
        return self.inner.length(sample)

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """One line of the rows; with `share` rows of the same pictures begin together."""
        samples = [sample for sample, _ in rows]
        if not self.share:
            return self._pack([self.inner.render(sample) for sample in samples])
        shown = shown_alike([sample.media for sample in samples]).tolist()
        rendered: list[Rendered] = []
        for at, sample in enumerate(samples):
            first = shown.index(shown[at]) if shown[at] >= 0 else at
            known = first < at and len(samples[first].turns) == len(sample.turns)
            again = self.inner.sibling(rendered[first], samples[first], sample) if known else None
            rendered.append(again or self.inner.render(sample))
        return self._pack(rendered, shown)

    def _pack(self, rows: Sequence[Rendered], shown: Sequence[int] | None = None) -> Batch:
        ids = self.inner.media_ids
        return pack(rows, positions=self.positions, shown=shown, media_ids=ids, multiple=MULTIPLE)
