"""Whole sets looked at before training, some rows at a time: what is wrong with each row by itself, which stood before,
and which an evaluation set holds too. Held are the bad rows and what evaluation sets are compared by, never the rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mmft.data.inspect_rows import Look, Seen, inspect_rows
from mmft.data.likeness import Likes
from mmft.data.sample import Sample

_ROWS, _WEIGHT = 4096, 16 << 20
"""Rows, and characters and bytes of them, that are looked at in one go."""
_FEW = 200
"""Rows that are not worth a process of their own."""


class Places:
    """Where each of any number of texts stood first: in memory as far as a few megabytes go, then in a temporary file
    of SQLite's. Price: about 5 us a text."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("CREATE TABLE places (text TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def first(self, text: str, place: str) -> str | None:
        """The place of an earlier text that is the same; None keeps this one."""
        text = text.encode("utf-8", "replace").decode()
        if self._base.execute("INSERT OR IGNORE INTO places VALUES (?, ?)", (text, place)).rowcount:
            return None
        found = self._base.execute("SELECT place FROM places WHERE text = ?", (text,)).fetchone()
        return str(found[0])

    def close(self) -> None:
        """Give the file back."""
        self._base.close()


@dataclass
class Found:
    """What was found of one set: rows in all, those that are no samples, and of the bad ones place -> (id, reasons)."""

    rows: int = 0
    unread: int = 0
    bad: dict[str, tuple[str | None, list[str]]] = field(default_factory=dict)

    def add(self, where: str, name: str | None, reasons: Iterable[str]) -> None:
        """Add what is wrong with the row at a place."""
        known = self.bad.get(where, (None, []))[1]
        if added := [one for one in reasons if one not in known]:
            self.bad[where] = (name, known + added)


class Inspector:
    """Looks at sets, those for evaluation first, in `workers` processes (0: here); `shared` counts training rows that
    show a picture of an evaluation set beside another question."""

    def __init__(self, look: Look, *, workers: int, progress: Callable[[int], None] = lambda _: None) -> None:
        self.look, self.workers, self.progress = look, workers, progress
        self.shared = 0
        self._trained = Places()
        self._likes: dict[str, Likes] = {}
        self._held: dict[tuple[str, str], str] = {}
        self._shown: set[str] = set()

    def close(self) -> None:
        """Give temporary files back."""
        self._trained.close()

    def inspect(self, rows: Iterable[tuple[str, Sample | str]], name: str, *, evaluation: bool) -> Found:
        """Look at the rows (place, sample or what is wrong with it) of a set of this name."""
        found = Found()
        contents = Places() if evaluation else self._trained
        for part in _parts(rows, found):
            workers = self.workers if len(part) > _FEW else 0
            for sample, seen in zip(
                part, inspect_rows(part, self.look, workers=workers, progress=self.progress), strict=True
            ):
                reasons = list(seen.reasons)
                if (before := contents.first(seen.content, sample.where)) is not None:
                    reasons.append(f"the row is the same as {before}")
                if evaluation:
                    self._keep(sample, seen, f"{name}: {sample.where}")
                elif (kept := self._leaked(sample, seen)) is not None:
                    reasons.append(f"the row is also in the evaluation set {kept}")
                if reasons:
                    found.add(sample.where, sample.id, reasons)
        if evaluation:
            contents.close()
        return found

    def _keep(self, sample: Sample, seen: Seen, place: str) -> None:
        asked = _asks(sample)
        self._held.setdefault((asked, seen.content), place)
        for digest, look in seen.pictures:
            self._held.setdefault((asked, digest), place)
            self._shown.add(digest)
            if look.telling:
                self._likes.setdefault(asked, Likes()).add(look, place)

    def _leaked(self, sample: Sample, seen: Seen) -> str | None:
        """The evaluation row that a training row is: the same picture (by its bytes, or by its looks) with the same
        question; of pairs and tables, the same picture; without pictures, the same content."""
        asked = _asks(sample)
        kept = self._held.get((asked, seen.content)) or _seen_before(seen, asked, self._held, self._likes.get(asked))
        if kept is None and any(digest in self._shown for digest, _ in seen.pictures):
            self.shared += 1
        return kept


def _parts(rows: Iterable[tuple[str, Sample | str]], found: Found) -> Iterator[list[Sample]]:
    """The good rows, as many together as are looked at in one go; all are counted, the others added to `found`."""
    part: list[Sample] = []
    weight = 0
    for where, row in rows:
        found.rows += 1
        if isinstance(row, str):
            found.unread += 1
            found.add(where, None, [row])
            continue
        part.append(row)
        weight += _weight(row)
        if len(part) == _ROWS or weight > _WEIGHT:
            yield part
            part, weight = [], 0
    if part:
        yield part


def _weight(sample: Sample) -> int:
    texts = sum(len(turn.text) for turn in sample.turns) + sum(map(len, sample.answers))
    cells = sum(len(one.value) for one in sample.cells.values() if isinstance(one.value, str))
    return (
        texts
        + cells
        + sum(len(ref.data or b"") + sum(len(one.data or b"") for one in ref.frames) for ref in sample.media)
    )


def _seen_before(seen: Seen, asked: str, held: Mapping[tuple[str, str], str], likes: Likes | None) -> str | None:
    for digest, look in seen.pictures:
        name = held.get((asked, digest)) or (likes.find(look) if likes is not None and look.telling else None)
        if name is not None:
            return name
    return None


def _asks(sample: Sample) -> str:
    """The row's questions, spaces and capitals aside; "" for rows without turns."""
    return " ".join(" ".join(turn.text for turn in sample.turns if turn.role == "user").lower().split())
