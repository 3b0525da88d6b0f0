"""Tokens of many rows without opening a picture: `Renderer.sizes` of each, in a fraction of the time, taken once.

The chat template's compiled program is called without the copies that transformers makes of every message, texts are
tokenised in batches without offsets, and a picture is measured once however many rows show it. The first row of every
shape (roles and pieces) and every `LOOKED_AT`-th row after it are compared with the processor's own way; where they
differ, or anything is out of the ordinary, all rows are taken that way. What was found stays with the renderer for as
long as its rows live. Price: about 28 us a row and 20 us a picture; `Renderer.sizes` takes 400.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mmft.data.loader import RowRenderer
from mmft.data.opened import Measure
from mmft.data.render import Renderer, messages_of
from mmft.data.sample import MediaRef, Sample, Turn
from mmft.data.templates import time_limit
from mmft.data.uncollected import uncollected

LOOKED_AT = 128
_ROWS = 128
Size = tuple[int, int]
Shape = tuple[tuple[str, ...], ...]
Render = Callable[[list[dict[str, Any]]], str]
Count = Callable[[list[str]], list[int]]


class _Differs(Exception):
    """The short way would say something else than the processor."""


class _Known:
    """What is known of the rows of a renderer: sizes by the identity of their turns and media, which are held."""

    def __init__(self) -> None:
        self.plain = False
        self.rows: dict[tuple[int, int], tuple[Size, tuple[Turn, ...], tuple[MediaRef, ...]]] = {}

    def get(self, sample: Sample) -> Size | None:
        found = self.rows.get((id(sample.turns), id(sample.media)))
        return None if found is None else found[0]

    def put(self, sample: Sample, size: Size) -> None:
        self.rows[id(sample.turns), id(sample.media)] = (size, sample.turns, sample.media)


_KNOWN: WeakKeyDictionary[Renderer, _Known] = WeakKeyDictionary()


def row_lengths(
    renderer: Renderer, samples: Sequence[Sample], *, progress: Callable[[int], Any] = lambda _: None
) -> np.ndarray:
    """(rows, 2) int64: `renderer.sizes` of every row. Raises the DataError of a row that has none."""
    with uncollected():
        return _row_lengths(renderer, samples, progress)


def _row_lengths(renderer: Renderer, samples: Sequence[Sample], progress: Callable[[int], Any]) -> np.ndarray:
    known = _KNOWN.setdefault(renderer, _Known())
    short = None if known.plain else _Short.of(renderer)
    out = np.zeros((len(samples), 2), np.int64)
    for at in range(0, len(samples), _ROWS):
        part = samples[at : at + _ROWS]
        missing = [sample for sample in part if known.get(sample) is None]
        sizes: list[Size] | None = None
        if missing and short is not None:
            try:
                sizes = short(missing)
            except _Differs:
                known.rows.clear()
                known.plain = True
                return _row_lengths(renderer, samples, progress)
            except Exception:  # the row is named by the long way
                sizes = None
        for sample, size in zip(missing, sizes or map(renderer.sizes, missing), strict=True):
            known.put(sample, size)
        out[at : at + len(part)] = np.array([known.get(sample) for sample in part])
        progress(len(part))
    return out


def lengths_of(
    renderer: RowRenderer, samples: Sequence[Sample], *, progress: Callable[[int], Any] = lambda _: None
) -> list[int]:
    """`renderer.length` of every row; see `row_lengths`."""
    if isinstance(renderer, Renderer):
        return [int(size) for size in row_lengths(renderer, samples, progress=progress)[:, 0]]
    found = []
    for sample in samples:
        found.append(renderer.length(sample))
        progress(1)
    return found


class _Short:
    """Sizes of some rows at a time by the short way."""

    def __init__(self, renderer: Renderer, render: Render, count: Count) -> None:
        self.renderer, self.render, self.count = renderer, render, count
        self.shapes: dict[Shape, int] = {}
        self.measures: dict[MediaRef, Measure] = {}

    @classmethod
    def of(cls, renderer: Renderer) -> _Short | None:
        """None where the template or the tokenizer cannot be had by itself."""
        render, count = _template(renderer), _counter(renderer)
        return None if render is None or count is None else cls(renderer, render, count)

    def __call__(self, samples: Sequence[Sample]) -> list[Size]:
        with time_limit(self.renderer._place):
            texts = [self.render(messages_of(sample.turns)) for sample in samples]
        counts = self.count(texts)
        for sample, text, count in zip(samples, texts, counts, strict=True):
            self._compare(sample, text, count)
        gains = [sum(self.renderer._gain(self._measure(ref)) for ref in sample.media) for sample in samples]
        return [
            (count + gain, gain + len(sample.media)) for sample, count, gain in zip(samples, counts, gains, strict=True)
        ]

    def _compare(self, sample: Sample, text: str, count: int) -> None:
        shape = tuple([(turn.role, *[piece.kind for piece in turn.pieces]) for turn in sample.turns])
        seen = self.shapes.get(shape, 0)
        self.shapes[shape] = seen + 1
        if seen % LOOKED_AT == 0:
            whole = self.renderer.text(sample.turns)
            if whole != text or len(self.renderer._plain(whole)[0]) != count:
                raise _Differs

    def _measure(self, ref: MediaRef) -> Measure:
        found = self.measures.get(ref)
        if found is None:
            found = self.measures[ref] = self.renderer.opener.measure(ref)
        return found


def _template(renderer: Renderer) -> Render | None:
    """The text of messages by the compiled template itself, without transformers' copies of them."""
    template = getattr(renderer.processor, "chat_template", None) or renderer._chat_template
    template = template.get("default") if isinstance(template, dict) else template
    special = renderer.tokenizer.special_tokens_map
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:  # it is no public name
        return None
    if template is None or not all(type(value) is str for value in special.values()):
        return None
    compiled = _compile_jinja_template(template)
    fixed = {"tools": None, "documents": None, "add_generation_prompt": False, **special}
    given = {**compiled.globals, **fixed}  # `compiled.render` would put it together anew for each row

    def render(messages: list[dict[str, Any]]) -> str:
        given["messages"] = messages
        return str(compiled.environment.concat(compiled.root_render_func(compiled.new_context(given, shared=True))))

    return render


def _counter(renderer: Renderer) -> Count | None:
    """Tokens of texts in one call of the tokenizer's own program."""
    renderer._plain("a")  # transformers switches off the truncation and padding that a file may state
    backend: Any = getattr(renderer.tokenizer, "backend_tokenizer", None)
    encode = getattr(backend, "encode_batch_fast", None)
    if encode is None or backend.truncation is not None or backend.padding is not None:
        return None

    def count(texts: list[str]) -> list[int]:
        found = [0] * len(texts)
        bare = [bool(renderer._specials(text)) for text in texts]
        for flag in set(bare):
            places = [at for at, one in enumerate(bare) if one == flag]
            encoded = encode([texts[at] for at in places], add_special_tokens=not flag)
            for at, one in zip(places, encoded, strict=True):
                found[at] = len(one)
        return found

    return count
