"""The files of a streamed set: where they are, how many rows each has, and a bounded cache for those that are fetched.

A set is a file, a folder, a pattern (`shards/*.tar`), or a list of shards as webdataset's `wids` writes it:
`{"shardlist": [{"url": ..., "nsamples": ..., "filesize": ..., "sha256": ...}]}`. Files without a number of rows are
gone through once before training; what was found is kept in the cache, below `streams/`. A shard with a URL is brought
by the function that `--fetch` names, one at a time; when the cache is full, the one longest unused is thrown out.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmft.data.objects import read_object
from mmft.data.stream_shards import SUFFIXES, Scanned, Shard, scan
from mmft.digests import sha256_bytes
from mmft.errors import DataError
from mmft.files import write_json
from mmft.journal import Journal
from mmft.lock import one_at_a_time
from mmft.paths import cache_limit, cache_root, contained

Fetch = Callable[[str, Path], Any]
"""Brings what a URL names into the file of that path; the user's own code, named on the command line or in Python."""
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:")
TOGETHER = 4
"""Fetched shards that are shuffled into each other; a cache that holds twice as many never brings one twice a pass."""


class ShardError(DataError):
    """A file of a stream as a whole is not there or not what it was; such an error is never one of a row."""


@dataclass(frozen=True)
class Entry:
    """One file: its path or URL, and what a list of shards says of it."""

    place: str
    rows: int | None = None
    size: int | None = None
    sha256: str | None = None

    @property
    def remote(self) -> bool:
        """Whether it must be fetched."""
        return bool(_URL.match(self.place))

    @property
    def suffix(self) -> str:
        """The file's ending, which says how it is read."""
        return Path(self.place.split("?")[0].split("#")[0]).suffix.lower()


def entries_of(path: Path) -> list[Entry]:
    """The files of a set in their order (by name, or as listed). Raises DataError where there are none, and for a list
    that is none."""
    if path.suffix == ".json":
        return _listed(path)
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.suffix in SUFFIXES and not one.name.startswith("."))
    else:
        found = [path] if path.is_file() else sorted(Path(one) for one in glob.glob(str(path), recursive=True))
    found = [one for one in found if one.is_file()]
    if not found or any(one.suffix not in SUFFIXES for one in found):
        raise ShardError(
            "there are no files of rows" if not found else f"'{found[0].name}' cannot be streamed",
            where=str(path),
            allowed=f"a file, folder or pattern of {', '.join(SUFFIXES)} files, or a .json with a `shardlist`",
            do="mend the path; mmft convert --to webdataset writes shards",
        )
    return [Entry(str(one.absolute())) for one in found]


def entries_root(path: Path) -> Path:
    """The folder that media paths in rows are relative to: the set's own, of a pattern the part before its marks."""
    if path.is_dir():
        return path
    return next((one for one in path.parents if "*" not in str(one)), path.parent)


def _listed(path: Path) -> list[Entry]:
    shards = read_object(path).get("shardlist")
    if not isinstance(shards, list) or not shards:
        raise ShardError("the file has no list `shardlist`", where=str(path), do="name a list of shards, or the shards")
    found = []
    for number, shard in enumerate(shards):
        where = f"{path}: shard {number}"
        shard = {"url": shard} if isinstance(shard, str) else shard
        url = shard.get("url") if isinstance(shard, dict) else None
        if not isinstance(url, str):
            raise ShardError("the shard has no `url`", where=where, allowed="a path beside the list, or a URL")
        counts = {name: shard.get(name) for name in ("nsamples", "filesize")}
        for name, value in counts.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ShardError(f"`{name}` is {value!r}", where=where, allowed="a whole number")
        entry = Entry(url, counts["nsamples"], counts["filesize"], shard.get("sha256"))
        if entry.suffix not in SUFFIXES:
            raise ShardError(f"'{url[:120]}' cannot be streamed", where=where, allowed=", ".join(SUFFIXES))
        if not entry.remote:
            entry = Entry(str(contained(path.parent, url)), entry.rows, entry.size, entry.sha256)
        found.append(entry)
    return found


class StreamFiles:
    """The files of one set; any of them can be opened. `limit`: bytes that fetched ones may take."""

    def __init__(self, path: Path, *, fetch: Fetch | None = None, limit: int | None = None) -> None:
        self.entries = entries_of(path)
        self.fetch, self.limit = fetch, cache_limit() if limit is None else limit
        told = json.dumps([str(path.absolute()), [one.place for one in self.entries]])
        self.folder = cache_root() / "streams" / sha256_bytes(told.encode())[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.root = entries_root(path)
        self._rows: tuple[int, ...] | None = None

    @property
    def remote(self) -> bool:
        """Whether some files must be fetched."""
        return any(one.remote for one in self.entries)

    def count(self, journal: Journal, *, name: str) -> tuple[int, ...]:
        """Rows of every file: as listed, as found before, or counted now."""
        if self._rows is None:
            found = []
            with journal.progress(len(self.entries), f"{name}: files counted") as bar:
                for number, entry in enumerate(self.entries):
                    found.append(entry.rows if entry.rows is not None else self._at_hand(number)[1].rows)
                    bar.update(1)
            self._rows = tuple(found)
            if not sum(found):
                raise ShardError("the data set has no rows", where=name, do="check the path")
        return self._rows

    @property
    def fingerprint(self) -> str:
        """sha256 over the rows and digests of all files, as listed or as counted; after `count`."""
        told = [
            [entry.place, entry.rows, entry.size, entry.sha256]
            if entry.rows is not None
            else asdict(self._known(number) or Scanned(0, ""))
            for number, entry in enumerate(self.entries)
        ]
        return sha256_bytes(json.dumps(told).encode())

    def reachable(self, number: int) -> bool:
        """Whether a file can be opened without a `fetch` that is not there."""
        return not self.entries[number].remote or self.fetch is not None or self._path(number).exists()

    def open(self, number: int) -> Shard:
        """One file, opened. Raises DataError when it cannot be fetched, is broken, or is not what the list says."""
        entry = self.entries[number]
        while True:
            path, scanned = self._at_hand(number)
            try:
                shard = Shard(path, self._places(number), scanned, name=entry.place, inside=entry.remote)
                if entry.remote:
                    os.utime(path)  # the cache throws out what nobody has used for longest
                return shard
            except FileNotFoundError:
                if not entry.remote:  # another process has just thrown it out
                    raise

    # -- what is known of files, and those that are fetched ---------------------------------------------------------

    def _path(self, number: int) -> Path:
        entry = self.entries[number]
        return self.folder / f"{number:06d}{entry.suffix}" if entry.remote else Path(entry.place)

    def _places(self, number: int) -> Path:
        return self.folder / f"{number:06d}.places"

    def _facts(self, number: int) -> Path:
        return self.folder / f"{number:06d}.facts.json"

    def _known(self, number: int) -> Scanned | None:
        """What was found when the file was last gone through; None where it was not."""
        try:
            return Scanned(**json.loads(self._facts(number).read_bytes())["found"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _at_hand(self, number: int) -> tuple[Path, Scanned]:
        path = self._path(number)
        if (known := self._current(number)) is not None:
            return path, known
        try:
            with one_at_a_time(self.folder):
                if (known := self._current(number)) is None:
                    if self.entries[number].remote and not path.exists():
                        with one_at_a_time(self.folder.parent):
                            self._bring(number, path)
                    known = self._scanned(number, path)
        except OSError as error:
            what = f"the file cannot be read: {error.strerror or error}"
            raise ShardError(what, where=self.entries[number].place, do="look at the file and at the cache") from error
        return path, known

    def _current(self, number: int) -> Scanned | None:
        """What is known of a file that is there and has not changed since."""
        path = self._path(number)
        try:
            held = json.loads(self._facts(number).read_bytes())
            stamp = _stamp(path) if not self.entries[number].remote else [path.stat().st_size]
            return Scanned(**held["found"]) if held["stamp"] == stamp and self._places(number).exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _scanned(self, number: int, path: Path) -> Scanned:
        """Go through a file, hold it to the list and to what it was before, and write down what was found."""
        entry, before = self.entries[number], self._known(number)
        stamp = _stamp(path) if not entry.remote else [path.stat().st_size]
        for left in self.folder.glob(f"{self._places(number).name}.*.part"):  # of a process that was killed
            left.unlink(missing_ok=True)
        found = scan(path, self._places(number))
        given: dict[str, tuple[Any, Any]] = {
            "nsamples": (entry.rows, found.rows),
            "filesize": (entry.size, path.stat().st_size),
            "sha256": (entry.sha256, found.sha256),
        }
        fixed = entry.remote or entry.rows is not None  # the run's fingerprint cannot show a change of these
        if fixed and before is not None:
            given["sha256 when it was last read"] = (before.sha256, found.sha256)
        wrong = [
            f"{name} {wanted}, found {seen}" for name, (wanted, seen) in given.items() if wanted not in (None, seen)
        ]
        if wrong:
            if entry.remote:
                path.unlink(missing_ok=True)
            raise ShardError(
                f"the file is not what it should be: {'; '.join(wrong)}",
                where=entry.place,
                do=f"mend the list of shards, or delete {self._facts(number)} where the change is meant",
            )
        write_json(self._facts(number), {"place": entry.place, "stamp": stamp, "found": asdict(found)})
        return found

    def _bring(self, number: int, path: Path) -> None:
        entry = self.entries[number]
        if self.fetch is None:
            raise ShardError(
                "the shard lies elsewhere, and nothing is fetched from the network by itself",
                where=entry.place,
                allowed="a path beside the list; a URL with `--fetch FILE.py:NAME` (mmft train, evaluate, merge)",
                do="name a function of (url, path) that brings the shard into that file",
            )
        largest = max((status.st_size for _, status in self._held()), default=0)
        self._make_room(min(entry.size or largest, self.limit))
        part = path.with_name(f"{path.stem}.part{entry.suffix}")
        part.unlink(missing_ok=True)
        try:
            self.fetch(entry.place, part)
            size = part.stat().st_size
        except Exception as error:  # whatever the user's function raises
            part.unlink(missing_ok=True)
            raise ShardError(
                f"the shard could not be fetched: {type(error).__name__}: {error}",
                where=entry.place,
                do="look at the function that --fetch names; the run goes on with --resume",
            ) from error
        if not part.is_file() or part.is_symlink() or size > self.limit:
            part.unlink(missing_ok=True)
            raise ShardError(
                f"the shard has {size} bytes",
                where=entry.place,
                allowed=f"a file of at most {self.limit} bytes ($MMFT_CACHE_SIZE)",
                do="make the cache larger, or the shards smaller",
            )
        self._make_room(size)
        os.replace(part, path)

    def _make_room(self, needed: int) -> None:
        """Throw out fetched shards until `needed` bytes more are within the limit (the one just brought is a part)."""
        held = sorted(self._held(), key=lambda one: (one[1].st_mtime_ns, one[0].name))
        total = sum(status.st_size for _, status in held)
        for path, status in held:
            if total + needed <= self.limit:
                return
            total -= status.st_size
            path.unlink(missing_ok=True)
            path.with_suffix(".places").unlink(missing_ok=True)

    def _held(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.parent.glob("*/*"):
            if path.suffix in SUFFIXES and path.stem.isdigit():
                yield path, path.stat()


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
