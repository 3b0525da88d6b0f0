"""Where the answers stand: character spans in the template's text, and their tokens in the processor's ids.

The processor's own chat template is the only source of text. An answer's span starts where the text of the generation
prompt ends (`messages[:k]` + generation prompt) and ends with what the template puts after the answer (its end-of-turn
token), white space excluded (`messages[:k + 1]`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmft.data.sample import Piece, Turn
from mmft.errors import DataError

Span = tuple[int, int]
Template = Callable[[Sequence[Turn], bool], str]
"""(turns, add_generation_prompt) -> text."""

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


def prefix_spans(template: Template, turns: Sequence[Turn], text: str) -> list[Span]:
    """The answers' spans in `text` by two renders per answer; the definition that the fast way must agree with.

    Raises DataError when the template does not render a conversation as an extension of its beginning.
    """
    spans = []
    for k, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before, upto = template(turns[:k], True), template(turns[: k + 1], False).rstrip()
        if not text.startswith(before) or not text.startswith(upto) or len(upto) <= len(before):
            raise DataError(
                f"the chat template does not render turn {k + 1} as an extension of the turns before it, "
                "so its answer cannot be told from the rest",
                allowed="templates whose text for a conversation starts with the text for its beginning",
                do="use another chat template for this processor, or rows with one answer only",
            )
        spans.append((len(before), len(upto)))
    return spans


@dataclass(frozen=True)
class _Skeleton:
    """The template's text for one shape of conversation: literals between the rows' own texts.

    `answers` holds per answer: index of its first text, characters between the span's start and that text, index of
    its last text, characters between that text's end and the span's end.
    """

    literals: tuple[str, ...]
    answers: tuple[tuple[int, int, int, int], ...]

    def spans(self, text: str, texts: Sequence[str]) -> list[Span] | None:
        """The answers' spans, or None when `text` is not the literals with `texts` between them."""
        starts, position = [], len(self.literals[0])
        pieces = [self.literals[0]]
        for piece, literal in zip(texts, self.literals[1:], strict=True):
            starts.append(position)
            position += len(piece) + len(literal)
            pieces += (piece, literal)
        if "".join(pieces) != text:
            return None
        spans = []
        for first, lead, last, tail in self.answers:
            start, end = starts[first] - lead, starts[last] + len(texts[last]) + tail
            while end > start and text[end - 1].isspace():
                end -= 1
            spans.append((start, end))
        return spans


class AnswerSpans:
    """Finds the answers' spans with one render per row: the template's literals are learned once per shape.

    Templates are code and may treat some contents in their own way, so every row is compared with its literals and
    falls back to `prefix_spans` when it differs.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._skeletons: dict[tuple, _Skeleton | None] = {}

    def __call__(self, turns: Sequence[Turn], text: str) -> list[Span]:
        shape = tuple((turn.role, *(piece.kind for piece in turn.pieces)) for turn in turns)
        if shape not in self._skeletons:
            self._skeletons[shape] = _learn(self._template, turns)
        skeleton = self._skeletons[shape]
        if skeleton is not None:
            texts = [piece.text for turn in turns for piece in turn.pieces if piece.kind == "text"]
            spans = skeleton.spans(text, texts)
            if spans is None:
                spans = skeleton.spans(text, [piece.strip() for piece in texts])
            if spans is not None:
                return spans
        return prefix_spans(self._template, turns, text)


def _learn(template: Template, turns: Sequence[Turn]) -> _Skeleton | None:
    """The skeleton of a shape from a render with marks in place of all texts; None when that does not work."""
    count, marked, ends = 0, [], []
    for turn in turns:
        pieces = []
        first = count
        for piece in turn.pieces:
            pieces.append(Piece("text", f"{_OPEN}{count}{_CLOSE}") if piece.kind == "text" else piece)
            count += piece.kind == "text"
        marked.append(Turn(turn.role, tuple(pieces)))
        if turn.role == "assistant":
            ends.append((first, count - 1))
    text = template(marked, False)
    found = list(_MARK.finditer(text))
    if [int(mark.group(1)) for mark in found] != list(range(count)):
        return None
    try:
        spans = prefix_spans(template, marked, text)
    except DataError:
        return None
    edges = [0, *(edge for mark in found for edge in mark.span()), len(text)]
    literals = tuple(text[start:end] for start, end in list(pairwise(edges))[::2])
    answers = []
    for (start, end), (first, last) in zip(spans, ends, strict=True):
        lead, tail = found[first].start() - start, end - found[last].end()
        if lead < 0 or tail < 0:
            return None
        answers.append((first, lead, last, tail))
    return _Skeleton(literals, tuple(answers))


def token_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Half-open token ranges that overlap the character spans; zero-width tokens (added specials) never do."""
    ranges, token = [], 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        stop = token
        last = token
        while stop < len(offsets) and offsets[stop][0] < end:
            stop += 1
            if offsets[stop - 1][1] > offsets[stop - 1][0]:
                last = stop
        ranges.append((token, last))
        token = last
    return ranges


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    return next(index for index in range(size) if a[index] != b[index])


def expand(ranges: Sequence[Span], short: list[int], long: list[int]) -> list[Span] | None:
    """Token ranges of the text with one placeholder per medium, moved to the ids with expanded media.

    `short` and `long` share what stands before the first and after the last medium. None when a range lies between
    media (the caller then takes the slow way) or when the two do not fit together.
    """
    if short == long:
        return list(ranges)
    gained = len(long) - len(short)
    left = common_prefix(short, long)
    right = min(common_prefix(short[::-1], long[::-1]), len(short) - left)
    moved = []
    for start, end in ranges:
        if end <= left and end <= len(short) - 1:
            moved.append((start, end))
        elif start >= len(short) - right:
            moved.append((start + gained, end + gained))
        else:
            return None
    return moved
