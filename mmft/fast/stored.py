"""A renderer that takes a row's pictures from the feature store, and does not open those it finds there.

A picture's place in the text becomes the same tokens whatever stands around it, as long as these begin and end with
tokens that no text merges with; which tokens, and what else the language model is told (grids, token types), is kept
with the features and checked on the row that is stored. The unit is all pictures of a row, because some processors
treat a picture by how many there are.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmft.data.loader import RowRenderer
from mmft.data.masks import Span
from mmft.data.media import media_digest
from mmft.data.opened import Opened, measure_of
from mmft.data.pictures import Pictures
from mmft.data.preference_render import PreferenceRenderer, with_answer
from mmft.data.prompts import PromptRenderer
from mmft.data.render import Rendered, Renderer
from mmft.data.sample import MediaRef, Sample, Turn
from mmft.fast.slabs import Slabs

_TOKENS, _KEPT, _ALONG = "tokens/", "kept/", "along/"
FEATURES = "features/"
"""Names of an entry's tensors: tokens of each place, what the model is told, what goes along the tokens, features."""


def address(media: Sequence[MediaRef], space: str) -> str:
    """Hex sha256 of the pictures' bytes, in order, in a space (`Tower.digest`)."""
    return hashlib.sha256("".join([space, *map(media_digest, media)]).encode()).hexdigest()


def chat_of(renderer: RowRenderer | None) -> Renderer | None:
    """What renders conversations in a renderer of rows: itself, or that of preferences and of questions."""
    found = renderer
    if isinstance(renderer, PreferenceRenderer):
        found = renderer.chat
    elif isinstance(renderer, PromptRenderer):
        found = renderer.inner
    return found if isinstance(found, Renderer) and type(found) in (Renderer, StoredRenderer) else None


def with_chat(renderer: RowRenderer, chat: Renderer) -> RowRenderer:
    """A copy of a renderer of rows with another renderer of conversations in it."""
    if isinstance(renderer, Renderer):
        return chat
    made = copy.copy(renderer)
    setattr(made, "chat" if isinstance(renderer, PreferenceRenderer) else "inner", chat)
    return made


def rendered(renderer: RowRenderer, chat: Renderer, sample: Sample) -> Rendered:
    """One forward's row of a sample: its conversation, that of its first answer, or its question alone."""
    if isinstance(renderer, PreferenceRenderer):
        return chat.render(with_answer(sample, sample.candidates[0]))
    return chat.prompt(sample) if isinstance(renderer, PromptRenderer) else chat.render(sample)


class _Unit(list[Opened]):
    """The pictures of a row: decoded, or `known` and only decoded by `opened`."""

    def __init__(self, key: str, known: Mapping[str, Tensor], opened: Callable[[], list[Opened]]) -> None:
        super().__init__(() if known else opened())
        self.key, self.known, self.opened = key, known, opened


class StoredRenderer(Renderer):
    """`inner` with features in the place of pixels: `Rendered.pictures` holds what the tower needs, in the type that it
    computes in, or its answer."""

    def __init__(self, inner: Renderer, slabs: Slabs, *, space: str, takes: frozenset[str], dtype: torch.dtype) -> None:
        self.__dict__.update(inner.__dict__)
        self.slabs, self.space, self.takes, self.dtype = slabs, space, takes, dtype
        self.opened = 0
        self._unit: _Unit | None = None
        self._text = ""
        decoder = getattr(self.tokenizer, "added_tokens_decoder", {})
        self._solid = {*self.tokenizer.all_special_ids, *decoder}

    def _media(self, turns: Sequence[Turn], media: Sequence[MediaRef], *, prompt: bool) -> list[Opened]:
        self._unit = None
        if not media:
            return []

        def opened() -> list[Opened]:
            self.opened += len(media)
            return super(StoredRenderer, self)._media(turns, media, prompt=prompt)

        key = address(media, self.space)
        self._unit = _Unit(key, self.slabs.get(key) or {}, opened)
        return self._unit

    def _encoded(
        self, turns: tuple[Turn, ...], media: list[Opened], *, prompt: bool
    ) -> tuple[tuple[Turn, ...], str, dict[str, Tensor]]:
        found = super()._encoded(turns, media, prompt=prompt)
        self._text = found[1]
        return found

    def _process(self, text: str, media: Sequence[Opened]) -> dict[str, Tensor]:
        if isinstance(media, _Unit) and media.known:
            return self._placed(text, media.known)
        return super()._process(text, media)

    def _slow_ranges(self, turns: tuple[Turn, ...], text: str, ids: list[int], media: list[Opened]) -> list[Span]:
        plain = media.opened() if isinstance(media, _Unit) and media.known else list(media)
        return super()._slow_ranges(turns, text, ids, plain)

    def _rendered(self, sample: Sample, data: dict[str, Tensor], labels: Tensor) -> Rendered:
        unit, self._unit = self._unit, None
        row = super()._rendered(sample, data, labels)
        if unit is None:
            return row
        told = {name: value for name, value in row.media.items() if not name.startswith("pixel")}
        if unit.known:
            features = {name: value for name, value in unit.known.items() if name.startswith(FEATURES)}
            pictures = Pictures(unit.key, known=features)
        else:
            record = self._record(row, self._text, unit)
            inputs = {
                name: value.to(self.dtype) if value.is_floating_point() else value
                for name, value in row.media.items()
                if name in self.takes
            }
            pictures = Pictures(unit.key if record else "", inputs=inputs, record=record)
        return dataclasses.replace(row, media=told, per_row=row.per_row & told.keys(), pictures=pictures)

    # -- a place and its tokens -------------------------------------------------------------------------------------

    def _places(self, short: list[int]) -> list[int]:
        return torch.isin(torch.tensor(short), self.media_ids).nonzero().flatten().tolist()

    def _record(self, row: Rendered, text: str, unit: _Unit) -> dict[str, Tensor]:
        """What is kept beside the features; {} where the row's tokens are not its text's with the places replaced."""
        short, whole = self._plain(text)[0], row.input_ids.tolist()
        places = self._places(short)
        if len(places) != len(unit):
            return {}
        lengths = [self._gain(measure_of(one)) + 1 for one in unit]
        if len(unit) == 1:
            lengths = [len(whole) - len(short) + 1]
        found: dict[str, Tensor] = {}
        spans, at, done = [], 0, 0
        for number, (place, length) in enumerate(zip(places, lengths, strict=True)):
            start = at + place - done
            tokens = whole[start : start + length]
            if whole[at:start] != short[done:place] or not tokens or not {tokens[0], tokens[-1]} <= self._solid:
                return {}
            found[f"{_TOKENS}{number}"] = torch.tensor(tokens, dtype=torch.int32)
            spans.append(slice(start, start + length))
            at, done = start + length, place + 1
        if whole[at:] != short[done:]:
            return {}
        for name, value in row.media.items():
            if tuple(value.shape[:2]) == (1, len(whole)) and not value.is_floating_point():
                beside = torch.ones(len(whole), dtype=torch.bool)
                for span in spans:
                    beside[span] = False
                if len(value[0, beside].unique(dim=0)) > 1:
                    return {}
                found[f"{_ALONG}{name}/rest"] = value[0, beside][:1]
                for number, span in enumerate(spans):
                    found[f"{_ALONG}{name}/{number}"] = value[0, span]
            elif not name.startswith("pixel"):
                found[f"{_KEPT}{name}"] = value
        return found

    def _placed(self, text: str, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the processor would say of a text and these pictures, but for the pixels."""
        short = self._plain(text)[0]
        places = self._places(short)
        data: dict[str, Any] = {name.removeprefix(_KEPT): v for name, v in known.items() if name.startswith(_KEPT)}

        def line(rest: Callable[[list[int]], Tensor], filled: Callable[[int], Tensor]) -> Tensor:
            """(1, T): texts as `rest` of their ids, places as `filled` of their number."""
            parts, done = [], 0
            for number, place in enumerate(places):
                parts += [rest(short[done:place]), filled(number)]
                done = place + 1
            return torch.cat([*parts, rest(short[done:])])[None]

        def ids(part: list[int]) -> Tensor:
            return torch.tensor(part, dtype=torch.int64)

        data["input_ids"] = line(ids, lambda number: known[f"{_TOKENS}{number}"].long())
        data["attention_mask"] = torch.ones_like(data["input_ids"])
        along = {name.split("/")[1] for name in known if name.startswith(_ALONG)}
        for name in sorted(along):
            one = known[f"{_ALONG}{name}/rest"]
            data[name] = line(
                lambda part, one=one: one.expand(len(part), *one.shape[1:]),  # type: ignore[misc]
                lambda number, name=name: known[f"{_ALONG}{name}/{number}"],  # type: ignore[misc]
            )
        return data
