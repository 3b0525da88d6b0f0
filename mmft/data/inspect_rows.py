"""Every row looked at before training: media opened as training opens them, tokens made, content digested."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from mmft.data.likeness import Likeness, likeness
from mmft.data.loader import RowRenderer
from mmft.data.media import frames_of, media_digest, open_image, picture_traits
from mmft.data.render import Renderer
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.data.sounds import MAX_SECONDS, open_audio
from mmft.data.videos import open_video
from mmft.errors import MmftError

_CHUNK = 32
_HELD: dict[str, tuple[Sequence[Sample], Look]] = {}
"""What the workers inherit by the fork, by the key of one inspection."""


@dataclass(frozen=True)
class Look:
    """How rows are looked at: caps, and the renderer of the model that will see them (None: media only)."""

    max_pixels: int
    max_seconds: float = MAX_SECONDS
    renderer: RowRenderer | None = None


@dataclass(frozen=True)
class Seen:
    """What was found of a row: reasons against it, a digest of its content, digests and likenesses of its pictures, and
    those of the reasons for which its media cannot be opened at all."""

    reasons: tuple[str, ...]
    content: str
    pictures: tuple[tuple[str, Likeness], ...] = ()
    unreadable: tuple[str, ...] = ()


def look_at(sample: Sample, look: Look) -> Seen:
    """Open and render one row. Every medium is opened; the row is rendered when all of them can be."""
    reasons: list[str] = []
    unreadable: list[str] = []
    digests: list[str] = []
    pictures: list[tuple[str, Likeness]] = []
    for ref in sample.media:
        try:
            digests.append(media_digest(ref))
            if ref.kind == "audio":
                open_audio(ref, sampling_rate=16000, max_seconds=look.max_seconds)
            elif ref.kind == "video":
                open_video(ref, count=1, max_pixels=look.max_pixels, max_seconds=look.max_seconds)
                for frame in frames_of(ref):
                    open_image(frame, max_pixels=look.max_pixels)
            else:
                picture, traits = _picture(ref, look.max_pixels)
                reasons += traits
                pictures.append((digests[-1], likeness(picture)))
        except MmftError as error:
            unreadable.append(_said(error))
    if not unreadable:
        reasons += _rendered(sample, look.renderer)
    every = tuple(dict.fromkeys(reasons + unreadable))
    return Seen(every, _content(sample, digests), tuple(pictures), tuple(unreadable))


def _picture(ref: MediaRef, max_pixels: int) -> tuple[Image.Image, list[str]]:
    return open_image(ref, max_pixels=max_pixels), list(picture_traits(ref, max_pixels=max_pixels))


def _rendered(sample: Sample, renderer: RowRenderer | None) -> list[str]:
    if renderer is None:
        return []
    try:
        if isinstance(renderer, Renderer) and sample.turns:
            renderer.render(sample)
            text = "\n".join(turn.text for turn in sample.turns)
            marks = [mark for mark in _marks(renderer) if mark in text]
            return [f"a text holds {mark!r}, a token that begins or ends a turn of this model" for mark in marks]
        elif not isinstance(renderer, Renderer):
            length = renderer.length(sample)
            return [f"the row has {length} tokens"] if length > renderer.max_length else []
    except MmftError as error:
        return [_said(error)]
    return []


@lru_cache(maxsize=4)
def _marks(renderer: Renderer) -> tuple[str, ...]:
    """Special tokens that the chat template writes around turns: in a text they would be read as such."""
    text = renderer.text([Turn("user", (Piece("text", "x"),)), Turn("assistant", (Piece("text", "y"),))])
    return tuple(mark for mark in renderer.tokenizer.all_special_tokens if mark in text)


def _said(error: MmftError) -> str:
    problem = error.problems[0]
    return problem.what + (f" (allowed: {problem.allowed})" if problem.allowed else "")


def _content(sample: Sample, digests: Sequence[str]) -> str:
    turns = [[turn.role, [[piece.kind, piece.text.strip()] for piece in turn.pieces]] for turn in sample.turns]
    cells = [[name, str(cell.value)] for name, cell in sample.cells.items() if not isinstance(cell.value, MediaRef)]
    told = json.dumps([turns, list(sample.answers), cells, list(digests)], ensure_ascii=True)
    return hashlib.sha256(told.encode()).hexdigest()


def inspect_rows(
    samples: Sequence[Sample], look: Look, *, workers: int, progress: Callable[[int], None] = lambda _: None
) -> list[Seen]:
    """`look_at` every row, in `workers` processes (0: here), in the rows' order. A row whose opening kills its process
    is found by itself and named, the others go on."""
    if not workers:
        found = []
        for sample in samples:
            found.append(look_at(sample, look))
            progress(1)
        return found
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    key = f"{os.getpid()}-{id(samples)}"
    _HELD[key] = (samples, look)
    try:
        chunks = [range(start, min(start + _CHUNK, len(samples))) for start in range(0, len(samples), _CHUNK)]
        return [seen for seen in _in_processes(key, chunks, workers, progress)]
    finally:
        del _HELD[key]


def _in_processes(key: str, chunks: list[range], workers: int, progress: Callable[[int], None]) -> Iterator[Seen]:
    done: dict[int, list[Seen]] = {}
    waiting = list(range(len(chunks)))
    while waiting:
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            futures = {at: pool.submit(_chunk, key, chunks[at]) for at in waiting}
            try:
                for at, future in futures.items():
                    done[at] = future.result()
                    progress(len(chunks[at]))
            except BrokenProcessPool:
                done |= {at: one.result() for at, one in futures.items() if one.done() and not one.exception()}
        waiting = [at for at in range(len(chunks)) if at not in done]
        if waiting:  # the first that is missing may hold the row that killed a process: its rows one by one
            done[waiting[0]] = [_alone(key, row) for row in chunks[waiting[0]]]
            progress(len(chunks[waiting.pop(0)]))
    for at in range(len(chunks)):
        yield from done[at]


def _alone(key: str, row: int) -> Seen:
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_one_thread) as pool:
        try:
            return pool.submit(_chunk, key, range(row, row + 1)).result()[0]
        except BrokenProcessPool:
            killed = ("opening the row killed the process that did it",)
            return Seen(killed, f"killed-{row}", unreadable=killed)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _chunk(key: str, rows: range) -> list[Seen]:
    samples, look = _HELD[key]
    return [look_at(samples[row], look) for row in rows]
