"""Sets that are read as they come: `Streamed` gives any row by its number and holds none, so a set may be larger than
memory, and with fetched shards larger than the disk.

Rows are not looked at before training. One that is bad is met by the step that wants it: the run stops there, or with
`max_bad_fraction` above 0 the step goes on without it, the same on every resume, worker and rank.
"""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np

from mmft.data.augment import Augmentation
from mmft.data.dialects import RowContext
from mmft.data.formats import PARSERS, TABLE, guessed, source_name
from mmft.data.mixture import draws_of
from mmft.data.readers import Row
from mmft.data.render import TooLongError
from mmft.data.sample import Sample
from mmft.data.stream_files import TOGETHER, Fetch, ShardError, StreamFiles
from mmft.data.stream_order import StreamSet
from mmft.data.stream_shards import Shard
from mmft.data.tables import Columns
from mmft.digests import sha256_bytes
from mmft.errors import DataError, MmftError, Problem
from mmft.journal import Journal
from mmft.recipe.schema import DataSection, DataSource

Learned = Callable[[Callable[[int], Sample], int, int], Sample]
"""(rows by number, a number, how many there are) -> the row as an objective learns from it. It may ask for others."""
Described = Callable[[Sequence[Row], Mapping[str, str]], Columns]
"""(first rows, declared kinds) -> the columns of a table."""
_LOOK = 20
_OPEN = 64
"""Files of one set that a process keeps open (fetched ones: the shards of one group)."""


class _ByNumber(Sequence[Sample]):
    """Samples that a number or a slice asks for; a subclass gives one at a time."""

    @abstractmethod
    def row(self, number: int) -> Sample:
        """The sample of a number from 0 on, below the length."""

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self.row(one) for one in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.row(number)


def _as_read(rows: Callable[[int], Sample], number: int, _: int) -> Sample:
    return rows(number)


class StreamedSet(_ByNumber):
    """The rows of one streamed set. One of which nothing can be learned raises DataError when it is asked for.

    `wanted`: dialects that the objective learns from; `learned`: what it makes of a row; `described`: how it finds the
    columns of a table.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        system: str | None,
        wanted: Sequence[str],
        fetch: Fetch | None,
        learned: Learned = _as_read,
        described: Described | None = None,
    ) -> None:
        path = Path(source.path)
        self.files = StreamFiles(path, fetch=fetch)
        self.name = source_name(source)
        root = Path(source.media_root) if source.media_root else self.files.root
        self._source, self._wanted, self._path = source, tuple(wanted), path
        self._learned, self._described = learned, described
        self.columns: Columns | None = None
        self._context = RowContext(name=self.name, root=root, columns=dict(source.columns), system=system)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._process = os.getpid()
        self._format: str | None = None
        self.set = StreamSet((0,))

    def counted(self, journal: Journal) -> StreamedSet:
        """Itself, with its rows counted."""
        self.set = StreamSet(self.files.count(journal, name=self.name), TOGETHER if self.files.remote else 0)
        return self

    def __len__(self) -> int:
        return self.set.rows

    def row(self, number: int) -> Sample:
        """One row by its number, as it is learned from."""
        return self._learned(self.read, number, len(self))

    def read(self, number: int) -> Sample:
        """One row by its number, as it stands in its file."""
        file = int(np.searchsorted(self.set.starts, number, side="right")) - 1
        shard = self._shard(file)
        where, row = shard.row(number - int(self.set.starts[file]))
        if isinstance(row, DataError):
            raise row
        try:
            return shard.with_media(PARSERS[self.format](row, where, number + 1, self._context))
        except DataError as error:
            raise DataError([problem.within(where) for problem in error.problems]) from error

    @property
    def format(self) -> str:
        """The dialect of the rows: as the recipe says, or as the first ones show."""
        if self._format is None:
            form: str = self._source.format
            if form not in PARSERS or form == TABLE:
                first = self._first_rows()
                form = form if form == TABLE else guessed(first, self._source, self._path, self._wanted)
            if form not in self._wanted:
                raise DataError(
                    f"the rows of '{self.name}' are {form}, which this objective does not learn from",
                    where=str(self._path),
                    allowed=", ".join(self._wanted),
                    do="change objective.name, or set data.train[].format",
                )
            if form == TABLE and self._described is not None:
                self.columns = self._described(first, self._source.columns)
                self._context = replace(self._context, columns=self.columns.kinds)
            self._format = form
        return self._format

    def _first_rows(self) -> list[Row]:
        file = next(at for at, size in enumerate(self.set.sizes) if size)
        found = [self._shard(file).row(number) for number in range(min(_LOOK, self.set.sizes[file]))]
        rows = [row for _, row in found if not isinstance(row, DataError)]
        if not rows:
            broken = [problem for _, row in found[:5] if isinstance(row, DataError) for problem in row.problems]
            raise DataError([Problem(f"none of the first {len(found)} rows can be read", str(self._path)), *broken])
        return rows

    def _shard(self, file: int) -> Shard:
        if self._process != os.getpid():  # a loader worker: an opened file's position is shared with its parent
            self._open, self._process = OrderedDict(), os.getpid()
        if file not in self._open:
            while len(self._open) >= (TOGETHER if self.files.remote else _OPEN):
                self._open.popitem(last=False)[1].close()
            self._open[file] = self.files.open(file)
        self._open.move_to_end(file)
        return self._open[file]


class Streamed(_ByNumber):
    """Training sets behind one another, some of them streamed, of which an epoch takes `draws` rows each.

    `bad_allowed`: share of rows that may be left out when met; `long_allowed`: whether over-long rows are.
    """

    def __init__(
        self,
        parts: Sequence[StreamedSet | list[Sample]],
        *,
        names: Sequence[str],
        draws: Sequence[int],
        section: DataSection,
    ) -> None:
        self.parts, self.names, self.draws = tuple(parts), tuple(names), tuple(draws)
        self.sets = tuple(part.set if isinstance(part, StreamedSet) else StreamSet((len(part),)) for part in parts)
        self.starts = np.concatenate(([0], np.cumsum([one.rows for one in self.sets])))
        self.bad_allowed, self.long_allowed = section.max_bad_fraction, section.over_length == "drop"
        self.augment: Augmentation | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, number: int) -> Sample:
        """One row by its number in all sets, to be changed as the recipe says."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        sample = self.parts[part][number - int(self.starts[part])]
        return sample if self.augment is None else replace(sample, augment=self.augment)

    def leaves_out(self, error: MmftError) -> bool:
        """Whether a row that raised this is left out; else it stops the run."""
        if isinstance(error, TooLongError) and self.long_allowed:
            return True
        return isinstance(error, DataError) and not isinstance(error, ShardError) and self.bad_allowed > 0

    def near(self, count: int, tried: Callable[[Sample], object] | None = None) -> list[Sample]:
        """Up to `count` of the first good rows (those that `tried` does not refuse), as far as they can be read without
        a `fetch` that is not there."""
        found: list[Sample] = []
        for part, first in zip(self.parts, self.starts, strict=False):
            if isinstance(part, StreamedSet) and not part.files.reachable(0):
                continue
            good = 0
            for number in range(min(len(part), count + _LOOK)):
                try:
                    sample = self[int(first) + number]
                    if tried is not None:
                        tried(sample)
                except MmftError as error:
                    if not self.leaves_out(error):
                        raise
                    continue
                found.append(sample)
                if (good := good + 1) == count:
                    break
        return found[:: max(1, len(found) // count)][:count]

    @property
    def streamed(self) -> list[StreamedSet]:
        """Those that are streamed."""
        return [part for part in self.parts if isinstance(part, StreamedSet)]

    def told(self) -> Iterator[str]:
        """A line a streamed set, of a table its columns too."""
        for part in self.streamed:
            yield f"{part.name}: {len(part)} rows of {len(part.set.sizes)} files, read as they come"
            if part.columns is not None:
                yield part.columns.table()

    def fingerprint(self, held: str) -> str:
        """sha256 over the files of the streamed sets and `held`, the fingerprint of the others."""
        told = [part.files.fingerprint for part in self.streamed]
        return sha256_bytes(json.dumps([held, *told, self.draws]).encode())


def open_streams(
    section: DataSection,
    held: Sequence[Sample],
    *,
    wanted: Sequence[str],
    journal: Journal,
    fetch: Fetch | None = None,
    learned: Learned = _as_read,
    described: Described | None = None,
) -> Streamed:
    """The training sets of a recipe that streams some; `held` are the rows of the others, by their `source`.

    Raises DataError for files that cannot be counted.
    """
    by_name: dict[str, list[Sample]] = {}
    for sample in held:
        by_name.setdefault(sample.source, []).append(sample)
    parts: list[StreamedSet | list[Sample]] = []
    chosen: list[DataSource] = []
    for source in section.train:
        if source.streaming:
            make = partial(StreamedSet, source, system=section.system, fetch=fetch, wanted=wanted)
            parts.append(make(learned=learned, described=described).counted(journal))
            chosen.append(source)
        elif rows := by_name.pop(source_name(source), []):
            parts.append(rows)
            chosen.append(source)
    draws = draws_of([len(part) for part in parts], chosen, temperature=section.temperature)
    return Streamed(parts, names=[source_name(one) for one in chosen], draws=draws, section=section)
