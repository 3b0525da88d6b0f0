"""Errors as a person at 3 a.m. needs them: what happened, where, what is allowed, what to do.

Every failure a user can cause is a subclass of `MmftError`; each kind has an exit code of its own, so that a
shell script can tell a bad recipe (2) from a bad row (3), a bad checkpoint (4) or a diverged run (5).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `what` (with the value), `where` (file:line, row, field), `allowed`, `do`."""

    what: str
    where: str | None = None
    allowed: str | None = None
    do: str | None = None

    def within(self, place: str) -> Problem:
        """The same with the place it is in (a row) before what it names."""
        where = self.where or place
        return replace(self, where=where if where.startswith(place) else f"{place}: {where}")

    def lines(self) -> list[str]:
        """The house form, the first line without the error's kind."""
        rows = (("at", self.where), ("allowed", self.allowed), ("do", self.do))
        return [self.what, *(f"  {label:<7} {text}" for label, text in rows if text)]


class MmftError(Exception):
    """Base of all errors that are the user's to mend; the CLI prints it without a traceback.

    `problems` holds one entry, or several where a whole file was checked at once.
    """

    exit_code = 1

    def __init__(
        self,
        what: str | Iterable[Problem],
        *,
        where: str | None = None,
        allowed: str | None = None,
        do: str | None = None,
    ) -> None:
        problems = (Problem(what, where, allowed, do),) if isinstance(what, str) else tuple(what)
        if not problems:
            raise ValueError("an error needs at least one problem")
        self.problems = problems
        super().__init__(str(self))

    def __str__(self) -> str:
        kind = type(self).__name__
        return "\n".join(f"{kind}: " + "\n".join(problem.lines()) for problem in self.problems)

    def __reduce__(self) -> tuple[type[MmftError], tuple[tuple[Problem, ...]]]:
        # A loader worker's error crosses a process wall by pickling; the default would lose the keywords.
        return type(self), (self.problems,)


class RecipeError(MmftError):
    """The recipe, an override or a command-line value is wrong."""

    exit_code = 2


class DataError(MmftError):
    """A row, a media file or a whole data set is wrong."""

    exit_code = 3


class CheckpointError(MmftError):
    """A checkpoint, a run folder or the disk below it is wrong."""

    exit_code = 4


class NonFiniteError(MmftError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 5


class MemoryLimitError(MmftError):
    """The work does not fit into memory."""

    exit_code = 6


class BackboneError(MmftError):
    """A model folder, its config, weights or processor is wrong."""

    exit_code = 7


class AdapterError(MmftError):
    """An adapter, its targets or its base is wrong."""

    exit_code = 8


class ExportError(MmftError):
    """A merge or its proof failed."""

    exit_code = 9


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant, or None when none is near."""
    names = list(choices)
    found = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not found:
        lowered = {name.lower(): name for name in names}
        found = [lowered[match] for match in difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)]
    return found[0] if found else None


def choices(names: Iterable[str], *, word: str | None = None) -> str:
    """`a, b, c   (nearest: 'b')`: the text of an error's `allowed` line."""
    listed = list(names)
    near = nearest(word, listed) if word is not None else None
    return ", ".join(listed) + (f"   (nearest: '{near}')" if near else "")
