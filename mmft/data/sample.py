"""`Sample`: what every data format becomes, and the only thing that later stations read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mmft.data.augment import Augmentation, Drawn

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "audio", "video"]
CellKind = Literal["text", "numeric", "categorical", "label", "image", "audio", "video"]


def says_nothing(text: str) -> bool:
    """Whether a text has no character to be seen: empty, spaces, or such as U+200B."""
    return not any(one.isprintable() and not one.isspace() for one in text)


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A medium that has not been opened: a path below `root`, or the encoded bytes themselves.

    `span` (offset, length) names a stretch of the file, as a member of a tar shard is. A video may also be a folder of
    pictures (`path`) or a list of them (`frames`). `drawn`: how an opened picture is changed.
    """

    kind: MediaKind = "image"
    path: str | None = None
    root: Path | None = None
    data: bytes | None = None
    span: tuple[int, int] | None = None
    frames: tuple[MediaRef, ...] = ()
    drawn: Drawn | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a turn: a text, or the place where the next medium of the sample stands."""

    kind: Literal["text", "image", "audio", "video"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of a table's row; `value` is None where the row has none."""

    kind: CellKind
    value: str | float | bool | MediaRef | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the answers to a prompt that were compared or judged.

    `score`: a number given to it; `good`: a thumb up or down; `media`: pictures of its own in the places of the row's
    (None: the row's).
    """

    text: str
    score: float | None = None
    good: bool | None = None
    media: tuple[MediaRef, ...] | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One speaker's turn; its pieces in order."""

    role: Role
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The turn's text without its media."""
        return "".join(piece.text for piece in self.pieces if piece.kind == "text")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: turns, the media they mention in order, and where it came from.

    `answers` are the references an evaluation compares with (ten for VQA rows); empty means the last
    assistant turn is the one reference. A pair has no turns: its texts are the `answers`, texts that are wrong for its
    picture the `negatives`. A table's row has no turns either: `cells` holds every column in the table's order, `media`
    those of its cells. A row of preferences ends with the question; its `candidates` stand best first. `tags` are free
    labels such as the question type; `augment` is there on training rows whose pictures change from epoch to epoch.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[MediaRef, ...] = ()
    answers: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    cells: Mapping[str, Cell] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    where: str = ""
    augment: Augmentation | None = None

    def at(self, epoch: int) -> Sample:
        """The row as it is learned from in an epoch: its pictures know how they are changed."""
        if self.augment is None:
            return self
        augment = self.augment

        def drawn(place: int, ref: MediaRef) -> MediaRef:
            return replace(ref, drawn=augment.drawn(self.id, epoch, place)) if ref.kind == "image" else ref

        return replace(self.with_media(drawn), augment=None)

    def with_media(self, change: Callable[[int, MediaRef], MediaRef]) -> Sample:
        """The row with `change(place, medium)` in the place of each medium: its own, its cells', its candidates'."""
        media = tuple(change(place, ref) for place, ref in enumerate(self.media))
        new = {id(old): ref for old, ref in zip(self.media, media, strict=True)}
        cells = {
            name: replace(cell, value=new.get(id(cell.value), cell.value)) if isinstance(cell.value, MediaRef) else cell
            for name, cell in self.cells.items()
        }
        candidates = tuple(
            one if one.media is None else replace(one, media=tuple(change(at, ref) for at, ref in enumerate(one.media)))
            for one in self.candidates
        )
        return replace(self, media=media, cells=cells, candidates=candidates)

    @property
    def references(self) -> tuple[str, ...]:
        """The answers to compare a prediction with."""
        if self.answers:
            return self.answers
        last = self.turns[-1] if self.turns else None
        return (last.text,) if last is not None and last.role == "assistant" else ()

    @property
    def question(self) -> str:
        """The last user turn's text."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "user"), "")
