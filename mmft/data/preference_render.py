"""Answers to one prompt as rows of one forward: one after the other, or behind the prompt and pictures they share.

Plain rows are whole conversations, first answers first. In the shared layout a sample is one sequence

    [prompt and pictures][answer 1][answer 2] ...

in which each answer sees the prompt and itself, at the positions it would have alone: the same numbers as plain rows
wherever attention is causal and a token's state depends on what it sees and its position alone. Labels stand on the
answers and their end tokens; what a template puts behind those is cut off.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image

from mmft.data.audit import fingerprint
from mmft.data.collate import Batch, collate
from mmft.data.masks import common_prefix
from mmft.data.media import open_image
from mmft.data.render import IGNORED, OverLength, Rendered, Renderer
from mmft.data.sample import Candidate, MediaRef, Piece, Sample, Turn
from mmft.errors import DataError
from mmft.seeds import fold, generator

Altered = Literal["crop", "other"]
LEAST = float(torch.finfo(torch.bfloat16).min)
"""What a masked place gets: a number that 32- and 16-bit types both hold."""
_MOST_DIGESTS = 1 << 16
_CROPPED = 0.2
"""Largest share of a picture's area that is cut off (mDPO, Wang et al. 2024)."""


@dataclass(frozen=True)
class PreferenceBatch(Batch):
    """Answers of B samples, R in all.

    `owner`, `rank`, `score` (R,) say of each answer whose it is, its place among its sample's, and its number (nan
    where it has none). Its tokens with loss are `target` (N,) of answer `row` (N,), each predicted by the state at
    `at` (N,), counted through the flattened sequences; `last` (R,) is its last token. `keys`: one number an answer
    that its content alone decides. `altered`: the first answers again, with changed pictures.
    """

    owner: torch.Tensor
    rank: torch.Tensor
    score: torch.Tensor
    at: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    last: torch.Tensor
    keys: tuple[int, ...]
    altered: PreferenceBatch | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens with loss of each answer, (R,)."""
        return torch.bincount(self.row, minlength=len(self.owner))


def with_answer(sample: Sample, candidate: Candidate) -> Sample:
    """The conversation that ends with one of the sample's candidates."""
    turns = (*sample.turns, Turn("assistant", (Piece("text", candidate.text),)))
    media = sample.media if candidate.media is None else candidate.media
    return dataclasses.replace(sample, turns=turns, media=media, candidates=())


class PreferenceRenderer:
    """Samples with candidates to batches, through the renderer of conversations `chat`.

    `share`: the shared layout, for samples whose answers have the same pictures. `altered`: make changed pictures for
    the first answers, of (seed, epoch, id): a part cut off, or the pictures of another sample of `pool`.
    """

    refuses_long = True
    """A row that does not fit raises TooLongError when it is rendered."""

    def __init__(self, chat: Renderer, *, share: bool = False, altered: Altered | None = None, seed: int = 0) -> None:
        self.chat = chat
        self.max_length = chat.max_length
        self.over_length: OverLength = chat.over_length
        self.share = share
        self.altered = altered
        self.seed = seed
        self.pool: list[Sample] = []
        self._digests: dict[tuple[str, str], str] = {}
        tokenizer = chat.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # masked wherever it stands
        self._pad = next(int(one) for one in ids if one is not None)

    def length(self, sample: Sample) -> int:
        """Tokens of the prompt with its longest answer."""
        if not sample.candidates:
            return self.chat.length(sample)
        return max(self.chat.length(with_answer(sample, one)) for one in sample.candidates)

    def rendered(self, sample: Sample) -> list[Rendered]:
        """Every candidate's conversation, ending with its last trained token. Raises DataError naming the row."""
        if not sample.candidates:
            raise DataError(
                "the row has no candidates",
                where=f"{sample.where or sample.source} (id {sample.id})",
                allowed="chosen and rejected, ranked answers, or thumbs",
                do="give such rows, or put this set behind the first of data.eval",
            )
        head = with_answer(sample, sample.candidates[0])
        first = self.chat.render(head)
        rest = []
        for one in sample.candidates[1:]:
            other = with_answer(sample, one)
            same = other.media == head.media
            rest.append(self.chat.sibling(first, head, other) if same else self.chat.render(other))
        return [_trimmed(one) for one in (first, *rest)]

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> PreferenceBatch:
        """The batch of (sample, epoch) rows."""
        groups = [self.rendered(sample) for sample, _ in rows]
        samples = [sample for sample, _ in rows]
        order = sorted(((b, j) for b, group in enumerate(groups) for j in range(len(group))), key=lambda one: one[1])
        shared = self.share and all(one.media is group[0].media for group in groups for one in group)
        batch, places = _folded(groups, self._pad) if shared else _plain(groups, order, self._pad)
        altered = self._altered(rows) if self.altered else None
        return _located(batch, samples, groups, order, places=places, keys=self._keys(samples, order), altered=altered)

    def _altered(self, rows: Sequence[tuple[Sample, int]]) -> PreferenceBatch:
        made = []
        for sample, epoch in rows:
            first = dataclasses.replace(sample.candidates[0], media=None)
            made.append(dataclasses.replace(sample, media=self._changed(sample, epoch), candidates=(first,)))
        groups = [self.rendered(sample) for sample in made]
        if self.altered == "crop":  # seen once, so nothing that a store should keep
            groups = [[_not_kept(row) for row in group] for group in groups]
        order = [(b, 0) for b in range(len(made))]
        batch, places = _plain(groups, order, self._pad)
        return _located(batch, made, groups, order, places=places, keys=self._keys(made, order), altered=None)

    def _changed(self, sample: Sample, epoch: int) -> tuple[MediaRef, ...]:
        draw = generator(self.seed, "altered", epoch, sample.source, sample.id)
        media = sample.candidates[0].media or sample.media
        others = [one for one in self.pool if len(one.media) == len(media) and one.media != media]
        if self.altered == "other" and others:
            return others[draw.randrange(len(others))].media
        return tuple(self._cropped(ref, draw.uniform(0.0, _CROPPED), draw.random(), draw.random()) for ref in media)

    def _cropped(self, ref: MediaRef, share: float, across: float, down: float) -> MediaRef:
        image = open_image(ref, max_pixels=self.chat.max_image_pixels)
        side = (1.0 - share) ** 0.5
        width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
        left, top = round((image.width - width) * across), round((image.height - height) * down)
        out = io.BytesIO()
        part: Image.Image = image.crop((left, top, left + width, top + height))
        part.resize(image.size, Image.Resampling.BILINEAR).save(out, format="PNG")
        return MediaRef(kind="image", data=out.getvalue())

    def _keys(self, samples: Sequence[Sample], order: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """fold of the sample's digest and the answer's place: equal for equal content, in any file and order."""
        return tuple(fold(0, "answer", self._digest(samples[b]), j) for b, j in order)

    def _digest(self, sample: Sample) -> str:
        made = any(ref.data is not None for ref in sample.media)
        name = (sample.source, sample.id)
        if made or name not in self._digests:
            value = fingerprint([dataclasses.replace(sample, id="", source="", tags={})])
            if made:
                return value
            if len(self._digests) >= _MOST_DIGESTS:
                self._digests.clear()
            self._digests[name] = value
        return self._digests[name]


def _trimmed(row: Rendered) -> Rendered:
    """Without what stands behind the last token with loss."""
    end = int((row.labels != IGNORED).nonzero()[-1]) + 1
    size = len(row.input_ids)
    if end == size:
        return row
    media: dict[str, torch.Tensor] = {
        name: value[:, :end] if tuple(value.shape[:2]) == (1, size) and not value.is_floating_point() else value
        for name, value in row.media.items()
    }
    same = all(media[name] is value for name, value in row.media.items())
    return dataclasses.replace(
        row,
        input_ids=row.input_ids[:end],
        labels=row.labels[:end],
        media=row.media if same else media,
        text_tokens=end - row.media_tokens,
    )


def _not_kept(row: Rendered) -> Rendered:
    return row if row.pictures is None else dataclasses.replace(row, pictures=dataclasses.replace(row.pictures, key=""))


_Place = tuple[int, list[int]]
"""The sequence an answer stands in, and its tokens' places there from the first on."""


def _plain(
    groups: Sequence[Sequence[Rendered]], order: Sequence[tuple[int, int]], pad: int
) -> tuple[Batch, list[_Place]]:
    rows = [groups[b][j] for b, j in order]
    places = [(number, list(range(len(row.input_ids)))) for number, row in enumerate(rows)]
    return collate(rows, pad_token_id=pad), places


def _folded(groups: Sequence[Sequence[Rendered]], pad: int) -> tuple[Batch, list[_Place]]:
    """The shared layout; the places in the order by rank, then sample."""
    lines: list[dict[str, Any]] = []
    for group in groups:
        ids = [row.input_ids.tolist() for row in group]
        labelled = [int((row.labels != IGNORED).nonzero()[0]) for row in group]
        prefix = min(*labelled, *(common_prefix(ids[0], one) for one in ids[1:]), len(ids[0]))
        line: dict[str, Any] = {"ids": ids[0][:prefix], "at": list(range(prefix)), "part": [0] * prefix, "places": []}
        line["labels"] = [IGNORED] * prefix
        for number, (one, row) in enumerate(zip(ids, group, strict=True), start=1):
            begin, size = len(line["ids"]), len(one) - prefix
            line["places"].append([*range(prefix), *range(begin, begin + size)])
            line["ids"] += one[prefix:]
            line["labels"] += row.labels[prefix:].tolist()
            line["at"] += range(prefix, len(one))
            line["part"] += [number] * size
        lines.append(line)
    first = collate([group[0] for group in groups], pad_token_id=pad)
    size = max(len(line["ids"]) for line in lines)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([line[name] + [fill] * (size - len(line[name])) for line in lines])

    part, labels = padded("part", -1), padded("labels", IGNORED)
    media = {name: value for name, value in first.inputs.items() if name not in ("input_ids", "attention_mask")}
    tokens = int((part >= 0).sum())
    batch = dataclasses.replace(
        first,
        inputs={
            "input_ids": padded("ids", pad),
            "attention_mask": _mask(part),
            "position_ids": padded("at", 0),
            **media,
        },
        labels=labels,
        supervised=int((labels != IGNORED).sum()),
        tokens=tokens,
        padding=labels.numel() - tokens,
    )
    ranks = range(max(len(group) for group in groups))
    return batch, [(b, line["places"][j]) for j in ranks for b, line in enumerate(lines) if j < len(line["places"])]


def _mask(part: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T), added to the scores: a token sees the prompt (part 0) and its own part, not what comes later."""
    size = part.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool).tril()
    same = part[:, :, None] == part[:, None, :]
    prompt = (part == 0)[:, None, :]
    seen = earlier & (same | prompt) & (part >= 0)[:, None, :]
    seen |= torch.eye(size, dtype=torch.bool)  # padding sees itself, so that no row of scores is empty
    return torch.zeros(seen.shape).masked_fill(~seen, LEAST)[:, None]


def _located(
    batch: Batch,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Rendered]],
    order: Sequence[tuple[int, int]],
    *,
    places: Sequence[_Place],
    keys: tuple[int, ...],
    altered: PreferenceBatch | None,
) -> PreferenceBatch:
    width = batch.inputs["input_ids"].shape[1]
    at, target, row, last = [], [], [], []
    for number, ((b, j), (line, where)) in enumerate(zip(order, places, strict=True)):
        rendered = groups[b][j]
        tokens = [int(one) for one in (rendered.labels != IGNORED).nonzero()[:, 0] if one > 0]
        at += [line * width + where[token - 1] for token in tokens]
        target += rendered.input_ids[tokens].tolist()
        row += [number] * len(tokens)
        last.append(line * width + where[-1])
    known = {field.name: getattr(batch, field.name) for field in dataclasses.fields(Batch)}
    known["ids"] = tuple(sample.id for sample in samples)
    known["counted"] = tuple((sample.source, 1) for sample in samples)
    scores = [samples[b].candidates[j].score for b, j in order]
    return PreferenceBatch(
        **known,
        owner=torch.tensor([b for b, _ in order]),
        rank=torch.tensor([j for _, j in order]),
        score=torch.tensor([float("nan") if one is None else one for one in scores]),
        at=torch.tensor(at),
        target=torch.tensor(target),
        row=torch.tensor(row),
        last=torch.tensor(last),
        keys=keys,
        altered=altered,
    )
