"""Pairs of a picture (or sound, or video) and its texts: rows, tokens and batches for contrastive learning.

A row has a medium (`image`, `audio`, `video`, or `file_name` of any of them) and one or more texts (`caption`,
`captions`, `text`, or `caption_1`, `caption_2`, ...; other names by `columns`), and may have texts that look right and
are wrong (`negatives`) and a `group`. Rows of one picture, as in caption files with a line for each caption, become one
sample. Rows with the same group are all right for each other (variants of one thing); by default the picture is the
group.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mmft.data.collate import Batch
from mmft.data.dialects import MAX_CHARS, RowContext
from mmft.data.media import kind_of_name, open_image
from mmft.data.references import media_reference
from mmft.data.render import OverLength
from mmft.data.sample import MediaKind, MediaRef, Sample, says_nothing
from mmft.data.sounds import open_audio
from mmft.errors import DataError, MmftError, Problem
from mmft.seeds import fold, generator

EXTRA = -1
"""The group of a text that belongs to no picture."""
LEFT, RIGHT = "left_groups", "right_groups"
_TEXTS = ("captions", "caption", "text")
_MEDIA: tuple[MediaKind, ...] = ("image", "audio", "video")
_CALLED = {"image": "picture", "audio": "sound", "video": "video"}
_NUMBERED = re.compile(r"caption_?[0-9]+")
_GROUP = "group"


def looks_like_pairs(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Whether at least half of the rows have a medium and a text column."""

    def fits(row: Mapping[str, Any]) -> bool:
        media = any(columns.get(name, name) in row for name in (*_MEDIA, "file_name"))
        return media and (any(columns.get(name, name) in row for name in _TEXTS) or any(map(_NUMBERED.fullmatch, row)))

    return 2 * sum(map(fits, rows)) >= len(rows)


def parse_pair(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """One row as a `Sample` without turns: its texts are the `answers`, wrong ones the `negatives`.

    Raises DataError for a row without a medium or a text, and for one with several media.
    """

    def column(name: str) -> Any:
        return row.get(context.columns.get(name, name))

    texts = next((value for name in _TEXTS if (value := column(name)) not in (None, "", [])), None)
    if texts is None:
        texts = [row[name] for name in row if _NUMBERED.fullmatch(name) and row[name] not in (None, "")] or None
    kind, medium = _medium({name: column(name) for name in (*_MEDIA, "file_name")}, where)
    given, tags = column("id"), row.get("tags") or {}
    if given is not None and not isinstance(given, (str, int)):
        raise DataError(f"the id is a {type(given).__name__}", where=where, allowed="a text or a whole number")
    if not isinstance(tags, dict):
        raise DataError(f"`tags` is a {type(tags).__name__}", where=where, allowed='an object {"name": "value"}')
    marks = {str(key): str(value) for key, value in tags.items() if value is not None}
    if column(_GROUP) not in (None, ""):
        marks[_GROUP] = str(column(_GROUP))
    return Sample(
        id=f"{context.name}-{number}" if given in (None, "") else str(given),
        turns=(),
        media=(media_reference(medium, context.root, where, kind),),
        answers=_texts(texts, "caption", where),
        negatives=() if column("negatives") in (None, "", []) else _texts(column("negatives"), "negative", where),
        tags=marks,
        source=context.name,
        where=where,
    )


def _medium(given: Mapping[str, Any], where: str) -> tuple[MediaKind, Any]:
    """The one medium of a row and its kind."""
    found = [(kind, given[kind]) for kind in _MEDIA if given[kind] not in (None, "", [])]
    name = given["file_name"]
    if not found and isinstance(name, str) and (kind := kind_of_name(name)) is not None:
        found = [(kind, name)]
    if not found:
        raise DataError("the row has no picture", where=where, do="give every row an image, or take the row out")
    if len(found) > 1:
        raise DataError(
            f"the row has {' and '.join(f'{kind} {value!r:.40}' for kind, value in found)}",
            where=where,
            allowed="one medium in a pair",
            do="take the other one out with data.train[].columns, for example {audio: none}",
        )
    kind, value = found[0]
    if isinstance(value, list) and kind != "video":
        if len(value) != 1:
            raise DataError(f"the row has {len(value)} {_CALLED[kind]}s", where=where, allowed="one in a pair")
        value = value[0]
    return kind, value


def _texts(value: Any, what: str, where: str) -> tuple[str, ...]:
    """A text or a list of texts; in a CSV file a list is written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        value = parsed if isinstance(parsed, list) else value
    listed = value if isinstance(value, list) else [value]
    for text in listed:
        if not isinstance(text, str) or says_nothing(text):
            kind = "empty" if isinstance(text, str) else "missing" if text is None else f"a {type(text).__name__}"
            raise DataError(f"a {what} is {kind}", where=where, allowed="a text")
        if len(text) > MAX_CHARS:
            raise DataError(f"a {what} has {len(text)} characters", where=where, allowed=f"at most {MAX_CHARS}")
    if not listed:
        raise DataError(f"the row has no {what}", where=where, do="give every row a text, or take the row out")
    return tuple(dict.fromkeys(text.strip() for text in listed))


def merge_pairs(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with the same picture and group as one, at the place of the first, its texts in order."""
    kept: dict[Any, Sample] = {}
    for sample in samples:
        ref = sample.media[0]
        key = (
            (sample.source, ref.path, ref.span, str(ref.root), sample.tags.get(_GROUP))
            if ref.path is not None
            else sample.id
        )
        first = kept.get(key)
        if first is not None:
            sample = dataclasses.replace(
                first,
                answers=tuple(dict.fromkeys((*first.answers, *sample.answers))),
                negatives=tuple(dict.fromkeys((*first.negatives, *sample.negatives))),
            )
        kept[key] = sample
    return list(kept.values())


def with_group(sample: Sample) -> Sample:
    """The sample with its picture as the group, where it has none and the picture a name."""
    ref = sample.media[0]
    if ref.path is None or _GROUP in sample.tags:
        return sample
    return dataclasses.replace(
        sample, tags={**sample.tags, _GROUP: f"{sample.source} {ref.root} {ref.path} {ref.span}"}
    )


def group_of(sample: Sample) -> int:
    """A number (63 bits) that rows which belong together share: that of their `group`, else of the row."""
    name = sample.tags.get(_GROUP)
    return fold(0, "group", name) if name is not None else fold(0, "row", sample.source, sample.id)


def draw_texts(sample: Sample, count: int, *, seed: int, epoch: int) -> list[str]:
    """`count` texts of a sample, drawn by (seed, epoch, id), in the row's order; all of them where `count` is 0."""
    texts = list(sample.answers)
    if not count or count >= len(texts):
        return texts
    draw = generator(seed, "captions", epoch, sample.source, sample.id)
    return [texts[place] for place in sorted(draw.sample(range(len(texts)), count))]


def open_picture(sample: Sample, *, max_image_pixels: int) -> Any:
    """The picture of a pair; its errors name the row."""
    return open_medium(sample, lambda ref: open_image(ref, max_pixels=max_image_pixels))


def open_medium(sample: Sample, opened: Callable[[MediaRef], Any]) -> Any:
    """The medium of a pair, opened by `opened`; its errors name the row."""
    try:
        return opened(sample.media[0])
    except MmftError as error:
        row = f"{sample.where or sample.source} (id {sample.id})"
        problems = [
            Problem(one.what, f"{row}: {one.where}" if one.where else row, one.allowed, one.do)
            for one in error.problems
        ]
        raise DataError(problems) from error


class PairRenderer:
    """Samples to batches with a dual encoder's processor (`tokenizer`, and `image_processor` or `feature_extractor`).

    `captions`: how many texts of a picture a step sees, drawn by (seed, epoch, id); 0 means all. Texts are padded to
    the longest of the batch where the model takes an attention mask, else to the tokenizer's own length, which such
    models (SigLIP) were trained with. Raises DataError for a processor without one of the two.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        over_length: OverLength = "error",
        max_image_pixels: int = 40_000_000,
        captions: int = 0,
        seed: int = 0,
    ) -> None:
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        self.feature_extractor: Any = getattr(processor, "feature_extractor", None)
        self.medium: MediaKind = "audio" if self.image_processor is None else "image"
        if self.tokenizer is None or (self.image_processor is None and self.feature_extractor is None):
            raise DataError(
                "pairs need a processor with a tokenizer and an image processor or a feature extractor of sounds",
                where=type(processor).__name__ if processor is not None else "no processor",
                do="put the processor's files into the model folder",
            )
        self.max_length = min(max_length, int(self.tokenizer.model_max_length))
        self.over_length: OverLength = over_length
        self.max_image_pixels = max_image_pixels
        self.captions = captions
        self.seed = seed

    def length(self, sample: Sample) -> int:
        """Tokens of the row's longest text."""
        rows = self.tokenizer([*sample.answers, *sample.negatives], truncation=False)["input_ids"]
        return max(len(row) for row in rows)

    def fits(self, sample: Sample) -> bool:
        """Whether every text of the row has at most `max_length` tokens."""
        return self.length(sample) <= self.max_length

    def chosen(self, sample: Sample, epoch: int) -> list[str]:
        """The texts of a sample that an epoch sees, in the row's order."""
        return draw_texts(sample, self.captions, seed=self.seed, epoch=epoch)

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """The batch of (sample, epoch) rows: both sides' inputs and the groups `LEFT` (pictures) and `RIGHT` (texts).

        Raises DataError naming the row for a picture that cannot be read.
        """
        texts: list[str] = []
        groups: list[int] = []
        for sample, epoch in rows:
            own = self.chosen(sample, epoch)
            texts += [*own, *sample.negatives]
            groups += [*[group_of(sample)] * len(own), *[EXTRA] * len(sample.negatives)]
        words = self.encode_texts(texts)
        left = torch.tensor([group_of(sample) for sample, _ in rows])
        inputs = {**self.encode_media([sample for sample, _ in rows]), **words}
        ids = words["input_ids"]
        tokens = int(words["attention_mask"].sum()) if "attention_mask" in words else ids.numel()
        return Batch(
            inputs={**inputs, LEFT: left, RIGHT: torch.tensor(groups)},
            labels=torch.zeros(0, dtype=torch.int64),
            ids=tuple(sample.id for sample, _ in rows),
            supervised=len(rows),
            tokens=tokens,
            padding=ids.numel() - tokens,
            counted=tuple((sample.source, 1) for sample, _ in rows),
        )

    def encode_texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the text side is given for some texts."""
        masked = "attention_mask" in self.tokenizer.model_input_names
        found = self.tokenizer(
            list(texts),
            padding="longest" if masked else "max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return dict(found)

    def encode_media(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the other side is given for some samples: pictures, or sounds where the processor takes these."""
        for sample in samples:
            if sample.media[0].kind != self.medium:
                kinds = (_CALLED[sample.media[0].kind], _CALLED[self.medium])
                raise DataError(
                    f"the row has a {kinds[0]}, and the model takes {kinds[1]}s",
                    where=sample.where or sample.id,
                    do=f"give every row a {kinds[1]}, or choose a model of {kinds[0]}s and texts",
                )
        return self.encode_images(samples) if self.medium == "image" else self.encode_sounds(samples)

    def encode_images(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the picture side is given for some samples."""
        pictures = [open_picture(sample, max_image_pixels=self.max_image_pixels) for sample in samples]
        with _refusals("image processor", samples, "look at the pictures' sizes"):
            return dict(self.image_processor(images=pictures, return_tensors="pt"))

    def encode_sounds(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the sound side is given for some samples, resampled to the rate it was trained with.

        CLAP's extractor cuts a long sound at a random place (of numpy's global state): here a row is always cut at the
        same place, by (seed, id).
        """
        rate, parts = self.feature_extractor.sampling_rate, []
        state = np.random.get_state()
        try:
            for sample in samples:
                sound = open_medium(sample, lambda ref: open_audio(ref, sampling_rate=rate))
                np.random.seed(fold(self.seed, "sounds", sample.source, sample.id) % 2**32)
                with _refusals("feature extractor", [sample], "look at the sound's length"):
                    parts.append(dict(self.feature_extractor(sound, sampling_rate=rate, return_tensors="pt")))
        finally:
            np.random.set_state(state)
        return {key: torch.cat([torch.as_tensor(part[key]) for part in parts]) for key in parts[0]}


@contextmanager
def _refusals(what: str, samples: Sequence[Sample], do: str) -> Iterator[None]:
    """A processor's error about some rows as a DataError that names them."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise DataError(
            f"the {what} refused the rows: {type(error).__name__}: {error}",
            where=", ".join(itertools.islice((sample.where or sample.id for sample in samples), 5)),
            do=do,
        ) from error
