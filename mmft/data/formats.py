"""Rows of any dialect become `Sample`s; every row that does not is listed with its line and reason.

Six dialects: `messages` (+ `images`), LLaVA `conversations`, `qa` (`image, question, answer(s)`), `pairs` (`image,
caption(s)`; sounds and videos too), `preference` (answers compared) and `table` (columns of any kind).
`layouts.py` says how a source lies on disk. No medium is decoded here; a path is only looked up below its media root.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmft.data.dialects import DIALECTS, RowContext, guess_format
from mmft.data.layouts import Source, open_source
from mmft.data.pairs import looks_like_pairs, parse_pair
from mmft.data.preference import PREFERENCE, looks_like_preferences, parse_preference
from mmft.data.readers import Row
from mmft.data.sample import Sample
from mmft.data.table_rows import parse_table
from mmft.data.tables import LABEL, Columns, infer_columns
from mmft.data.uncollected import uncollected
from mmft.errors import DataError, Problem
from mmft.recipe.schema import DataSection, DataSource
from mmft.seeds import fold

SHIPPED = "shipped:emoji-scenes/"
SHIPPED_PAIRS = "shipped:emoji-pairs/"
SHIPPED_CAPTIONS = "shipped:emoji-captions/"
SHIPPED_FUSION = "shipped:fusion/"
SHIPPED_PREFERENCES = "shipped:emoji-preferences/"
_LOOK = 20

TABLE = "table"
PARSERS = {**DIALECTS, "pairs": parse_pair, PREFERENCE: parse_preference, TABLE: parse_table}


@dataclass(frozen=True)
class Loaded:
    """One data set: its good samples in file order, the bad rows as (where, reason), the dialect, the layout, and the
    columns of a table."""

    samples: list[Sample]
    bad: list[tuple[str, str]]
    format: str
    name: str
    layout: str = "rows"
    columns: Columns | None = None

    @property
    def bad_fraction(self) -> float:
        """Share of the rows read that are bad."""
        return len(self.bad) / max(1, len(self.bad) + len(self.samples))

    def told(self) -> str:
        """What was read and how, for the console; of a table, its columns too."""
        return told(self.name, len(self.samples), self.format, self.layout, self.columns)


def told(name: str, rows: int, form: str, layout: str, columns: Columns | None) -> str:
    """`Loaded.told`."""
    line = f"{name}: {rows} rows read as '{form}'" + (f", lying as '{layout}'" if layout != "rows" else "")
    return line if columns is None else f"{line}\n{columns.table()}"


def source_path(source: DataSource) -> Path:
    """The file or folder a source names; the shipped sets are made on first use."""
    if source.path.startswith(SHIPPED):
        from mmft.data.scenes import shipped_rows

        return Path(shipped_rows(source.path.removeprefix(SHIPPED)))
    if source.path.startswith(SHIPPED_PAIRS):
        from mmft.data.pairs_emoji import shipped_pairs

        return shipped_pairs(source.path.removeprefix(SHIPPED_PAIRS))
    if source.path.startswith(SHIPPED_CAPTIONS):
        from mmft.data.scenes_captions import shipped_captions

        return shipped_captions(source.path.removeprefix(SHIPPED_CAPTIONS))
    if source.path.startswith(SHIPPED_FUSION):
        from mmft.data.fusion_sets import shipped_fusion

        return shipped_fusion(source.path.removeprefix(SHIPPED_FUSION))
    if source.path.startswith(SHIPPED_PREFERENCES):
        from mmft.data.preference_scenes import shipped_preferences

        return shipped_preferences(source.path.removeprefix(SHIPPED_PREFERENCES))
    return Path(source.path)


def source_name(source: DataSource) -> str:
    """The name in reports."""
    if source.name:
        return source.name
    return source.path.removeprefix(SHIPPED) if source.path.startswith(SHIPPED) else Path(source.path).stem


@dataclass(frozen=True)
class _Opened:
    """A source whose beginning was looked at: its rows from the first on, its dialect."""

    source: Source
    rows: Iterable[tuple[str, Row | DataError]]
    format: str
    name: str
    first: list[Row]


@dataclass(frozen=True)
class Incoming:
    """A data set whose rows come one at a time: (place, the sample or what is wrong with it)."""

    name: str
    format: str
    layout: str
    rows: Iterator[tuple[str, Sample | str]]
    columns: Columns | None = None


def incoming(
    source: DataSource,
    *,
    twice: Callable[[str, str], str | None],
    seed: int,
    system: str | None = None,
    wanted: Sequence[str] = (),
    columns: Columns | None = None,
    described: Callable[[Sequence[Row], Mapping[str, str]], Columns] | None = None,
) -> Incoming:
    """What `load_samples` reads, row by row. `twice`: (id, place) -> where the id was given before. What `num_samples`
    is chosen from is held as a whole, and so is a table unless `described` tells its columns from its first rows."""
    opened = _open(source, wanted)
    if opened.format == TABLE and described is not None:
        columns = described(opened.first, source.columns)
    elif opened.format == TABLE or source.num_samples is not None:
        held = load_samples(source, seed=seed, system=system, wanted=wanted, columns=columns)
        rows: list[tuple[str, Sample | str]] = [(one.where, one) for one in held.samples]
        return Incoming(held.name, held.format, held.layout, iter([*rows, *held.bad]), held.columns)
    tabular = columns if opened.format == TABLE else None
    context = _context(source, opened, system, tabular)
    return Incoming(
        opened.name, opened.format, opened.source.layout, _parsed(opened.rows, opened.format, context, twice), tabular
    )


def load_samples(
    source: DataSource,
    *,
    seed: int,
    system: str | None = None,
    wanted: Sequence[str] = (),
    columns: Columns | None = None,
) -> Loaded:
    """Read one source; bad rows are collected, not raised.

    `num_samples` good rows are chosen by fold(seed, name) and kept in file order; `system` is put before rows without
    a system turn. `wanted`: dialects that the run learns from (with `table` alone, every row is a table's); `columns`:
    those of the training rows, for a table that is not to be looked at for itself. Raises DataError when the source
    itself cannot be read, is empty, or has no known dialect.
    """
    opened = _open(source, wanted)
    if opened.format == TABLE:
        [opened], columns = _with_columns([source], [opened], columns)
    return _loaded(source, opened, seed=seed, system=system, columns=columns)


def _open(source: DataSource, wanted: Sequence[str]) -> _Opened:
    path = source_path(source)
    root = Path(source.media_root) if source.media_root else None
    found = open_source(path, layout=source.format, media_root=root)
    first = list(itertools.islice(found.rows, _LOOK))
    if not first:
        raise DataError(
            "the data set has no rows", where=str(path), do="check the path, or take the data set out of the recipe"
        )
    look = [row for _, row in first if not isinstance(row, DataError)]
    if not look:
        broken = [problem for _, row in first[:5] if isinstance(row, DataError) for problem in row.problems]
        raise DataError([Problem(f"none of the first {len(first)} rows can be read", str(path)), *broken])
    form = source.format if source.format in PARSERS else guessed(look, source, path, wanted)
    return _Opened(found, itertools.chain(first, found.rows), form, source_name(source), look)


def guessed(rows: Sequence[Row], source: DataSource, path: Path, wanted: Sequence[str]) -> str:
    """The dialect of the first rows of a source. Raises DataError where they show none."""
    if tuple(wanted) == (TABLE,):
        return TABLE
    if looks_like_preferences(rows):
        return PREFERENCE
    try:
        return guess_format(rows, source.columns, where=str(path))
    except DataError:
        if looks_like_pairs(rows, source.columns):
            return "pairs"
        if TABLE in wanted or any(LABEL in row for row in rows) or LABEL in source.columns.values():
            return TABLE
        raise


def _with_columns(
    sources: Sequence[DataSource], opened: Sequence[_Opened], columns: Columns | None
) -> tuple[list[_Opened], Columns]:
    """The sources with their rows in memory, and one set of columns for all of them: `columns`, else what they show."""
    held = [dataclasses.replace(one, rows=list(one.rows)) for one in opened]
    if columns is not None:
        return held, columns
    rows = [row for one in held for _, row in one.rows if not isinstance(row, DataError)]
    declared = {name: kind for source in sources for name, kind in source.columns.items()}
    return held, infer_columns(rows, declared=declared)


def _loaded(source: DataSource, opened: _Opened, *, seed: int, system: str | None, columns: Columns | None) -> Loaded:
    tabular = columns if opened.format == TABLE else None
    context = _context(source, opened, system, tabular)
    with uncollected():
        samples, bad = _parse(opened.rows, opened.format, context)
    if source.num_samples is not None and source.num_samples < len(samples):
        chosen = np.random.Generator(np.random.PCG64(fold(seed, "num_samples", opened.name)))
        kept = np.sort(chosen.permutation(len(samples))[: source.num_samples])
        samples = [samples[index] for index in kept]
    layout = opened.source.layout
    return Loaded(samples, bad, opened.format, opened.name, layout, tabular)


def _context(source: DataSource, opened: _Opened, system: str | None, columns: Columns | None) -> RowContext:
    names = columns.kinds if columns is not None else dict(source.columns)
    return RowContext(name=opened.name, root=opened.source.root, columns=names, system=system)


def _parse(
    rows: Iterable[tuple[str, Row | DataError]], form: str, context: RowContext
) -> tuple[list[Sample], list[tuple[str, str]]]:
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}

    def twice(name: str, where: str) -> str | None:
        first = seen.setdefault(name, where)
        return first if first is not where else None

    for where, found in _parsed(rows, form, context, twice):
        if isinstance(found, str):
            bad.append((where, found))
        else:
            samples.append(found)
    return samples, bad


def _parsed(
    rows: Iterable[tuple[str, Row | DataError]],
    form: str,
    context: RowContext,
    twice: Callable[[str, str], str | None],
) -> Iterator[tuple[str, Sample | str]]:
    """(place, the sample or what is wrong with it) of every row."""
    parse = PARSERS[form]
    for number, (where, row) in enumerate(rows, start=1):
        try:
            if isinstance(row, DataError):
                raise row
            sample = parse(row, where, number, context)
            if (before := twice(sample.id, where)) is not None:
                raise DataError(
                    f"id '{sample.id}' was given before, at {before}",
                    where=where,
                    do="give every row an id of its own, or none",
                )
        except DataError as error:
            yield where, _reason(error)
            continue
        yield where, sample


def _reason(error: DataError) -> str:
    problem = error.problems[0]
    return problem.what + (f" (allowed: {problem.allowed})" if problem.allowed else "")


def load_many(
    sources: Sequence[DataSource],
    section: DataSection,
    seed: int,
    *,
    wanted: Sequence[str] = (),
    columns: Columns | None = None,
) -> list[Loaded]:
    """Read several sources and hold them to `max_bad_fraction` each; see `load_samples`. Tables among them have the
    same columns: `columns`, or what their rows together show.

    Raises DataError with the count, the first five bad rows with their lines, and what to do.
    """
    opened = [_open(source, wanted) for source in sources]
    tables = [at for at, one in enumerate(opened) if one.format == TABLE]
    if tables:
        held, columns = _with_columns([sources[at] for at in tables], [opened[at] for at in tables], columns)
        for at, table in zip(tables, held, strict=True):
            opened[at] = table
    loaded = [
        _loaded(source, one, seed=seed, system=section.system, columns=columns)
        for source, one in zip(sources, opened, strict=True)
    ]
    for checked in loaded:
        check_bad(checked, section.max_bad_fraction)
    return loaded


def load_all(
    sources: Sequence[DataSource], section: DataSection, seed: int, *, wanted: Sequence[str] = ()
) -> list[Sample]:
    """The samples of several sources one after the other; see `load_many`."""
    return [sample for one in load_many(sources, section, seed, wanted=wanted) for sample in one.samples]


def check_bad(loaded: Loaded, max_bad_fraction: float) -> None:
    """Raise DataError when more rows are bad than the recipe allows, or when none is good."""
    total = len(loaded.bad) + len(loaded.samples)
    if loaded.samples and loaded.bad_fraction <= max_bad_fraction:
        return
    if not loaded.bad:
        return
    head = Problem(
        f"{len(loaded.bad)} of {total} rows of '{loaded.name}' are bad (read as '{loaded.format}')",
        allowed=f"a share of at most {max_bad_fraction:g} (data.max_bad_fraction)",
        do="mend the rows below, or set data.max_bad_fraction to leave bad rows out",
    )
    raise DataError([head, *(Problem(reason, where) for where, reason in loaded.bad[:5])])
