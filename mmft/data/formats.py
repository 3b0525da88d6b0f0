"""Rows of any dialect become `Sample`s; every row that does not is listed with its line and reason.

Four dialects: `messages` (+ `images`), LLaVA `conversations`, `qa` (`image, question, answer(s)`), and `pairs` (`image,
caption(s)`). No picture is decoded here; a path is only looked up below its media root.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmft.data.dialects import DIALECTS, RowContext, guess_format
from mmft.data.pairs import looks_like_pairs, parse_pair
from mmft.data.readers import Row, read_rows
from mmft.data.sample import Sample
from mmft.errors import DataError, Problem
from mmft.recipe.schema import DataSection, DataSource
from mmft.seeds import fold

SHIPPED = "shipped:emoji-scenes/"
SHIPPED_PAIRS = "shipped:emoji-pairs/"
_LOOK = 20

Format = Literal["messages", "llava", "qa", "pairs"]
PARSERS = {**DIALECTS, "pairs": parse_pair}


@dataclass(frozen=True)
class Loaded:
    """One data set: its good samples in file order, the bad rows as (where, reason), the dialect, the bad share."""

    samples: list[Sample]
    bad: list[tuple[str, str]]
    format: str
    name: str

    @property
    def bad_fraction(self) -> float:
        """Share of the rows read that are bad."""
        return len(self.bad) / max(1, len(self.bad) + len(self.samples))


def source_path(source: DataSource) -> Path:
    """The file or folder a source names; the shipped sets are made on first use."""
    if source.path.startswith(SHIPPED):
        from mmft.data.scenes import shipped_rows

        return Path(shipped_rows(source.path.removeprefix(SHIPPED)))
    if source.path.startswith(SHIPPED_PAIRS):
        from mmft.data.pairs_emoji import shipped_pairs

        return shipped_pairs(source.path.removeprefix(SHIPPED_PAIRS))
    return Path(source.path)


def source_name(source: DataSource) -> str:
    """The name in reports."""
    if source.name:
        return source.name
    return source.path.removeprefix(SHIPPED) if source.path.startswith(SHIPPED) else Path(source.path).stem


def load_samples(source: DataSource, *, seed: int, system: str | None = None) -> Loaded:
    """Read one source; bad rows are collected, not raised.

    `num_samples` good rows are chosen by fold(seed, name) and kept in file order; `system` is put before rows without
    a system turn. Raises DataError when the source itself cannot be read, is empty, or has no known dialect.
    """
    path, name = source_path(source), source_name(source)
    rows = read_rows(path)
    first = list(itertools.islice(rows, _LOOK))
    if not first:
        raise DataError(
            "the data set has no rows", where=str(path), do="check the path, or take the data set out of the recipe"
        )
    look = [row for _, row in first if not isinstance(row, DataError)]
    if not look:
        broken = [problem for _, row in first[:5] if isinstance(row, DataError) for problem in row.problems]
        raise DataError([Problem(f"none of the first {len(first)} rows can be read", str(path)), *broken])
    form = source.format if source.format != "auto" else _guessed(look, source, path)
    root = Path(source.media_root) if source.media_root else path.parent
    context = RowContext(name=name, root=root, columns=dict(source.columns), system=system)
    samples, bad = _parse(itertools.chain(first, rows), form, context)
    if source.num_samples is not None and source.num_samples < len(samples):
        chosen = np.random.Generator(np.random.PCG64(fold(seed, "num_samples", name)))
        kept = np.sort(chosen.permutation(len(samples))[: source.num_samples])
        samples = [samples[index] for index in kept]
    return Loaded(samples, bad, form, name)


def _guessed(rows: Sequence[Row], source: DataSource, path: Path) -> str:
    try:
        return guess_format(rows, source.columns, where=str(path))
    except DataError:
        if looks_like_pairs(rows, source.columns):
            return "pairs"
        raise


def _parse(
    rows: Iterable[tuple[str, Row | DataError]], form: str, context: RowContext
) -> tuple[list[Sample], list[tuple[str, str]]]:
    parse = PARSERS[form]
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, start=1):
        try:
            if isinstance(row, DataError):
                raise row
            sample = parse(row, where, number, context)
            if sample.id in seen:
                raise DataError(
                    f"id '{sample.id}' was given before, at {seen[sample.id]}",
                    where=where,
                    do="give every row an id of its own, or none",
                )
        except DataError as error:
            bad.append((where, _reason(error)))
            continue
        seen[sample.id] = where
        samples.append(sample)
    return samples, bad


def _reason(error: DataError) -> str:
    problem = error.problems[0]
    return problem.what + (f" (allowed: {problem.allowed})" if problem.allowed else "")


def load_many(sources: Sequence[DataSource], section: DataSection, seed: int) -> list[Loaded]:
    """Read several sources and hold them to `max_bad_fraction` each.

    Raises DataError with the count, the first five bad rows with their lines, and what to do.
    """
    loaded = [load_samples(source, seed=seed, system=section.system) for source in sources]
    for one in loaded:
        check_bad(one, section.max_bad_fraction)
    return loaded


def load_all(sources: Sequence[DataSource], section: DataSection, seed: int) -> list[Sample]:
    """The samples of several sources one after the other; see `load_many`."""
    return [sample for one in load_many(sources, section, seed) for sample in one.samples]


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
