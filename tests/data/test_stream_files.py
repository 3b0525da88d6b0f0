"""Files of streamed sets: rows by number against the plain readers, counted once, fetched into a bounded cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmft.data import stream_files
from mmft.data.convert import write_samples
from mmft.data.formats import load_samples
from mmft.data.layouts import open_source
from mmft.data.media import media_digest
from mmft.data.stream_files import ShardError, StreamFiles, entries_of
from mmft.data.stream_shards import Shard, scan
from mmft.errors import DataError
from mmft.journal import Journal
from mmft.paths import cache_root
from mmft.recipe.schema import DataSource
from tests.tiny import tiny_rows

QUIET = Journal(None, quiet=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


def written(folder: Path, to: str, rows: int = 20) -> list[Path]:
    """`rows` rows as files of a form: one, or shards of 7 rows."""
    samples = load_samples(DataSource(path=str(tiny_rows(folder / "rows", rows))), seed=0).samples
    if to == "parquet":
        import pyarrow.parquet as pq

        write_samples(samples, folder / "all.parquet", to=to)
        pq.write_table(pq.read_table(folder / "all.parquet"), folder / "all.parquet", row_group_size=6)
        return [folder / "all.parquet"]
    if to == "jsonl":
        return [folder / "rows" / "rows.jsonl"]
    found = []
    for number, start in enumerate(range(0, rows, 7)):
        write_samples(samples[start : start + 7], folder / f"s{number}", to="webdataset")
        found.append(shutil.move(folder / f"s{number}" / "000000.tar", folder / f"{number}.tar"))
    return [Path(one) for one in found]


def opened(path: Path, folder: Path) -> Shard:
    return Shard(path, folder / "places", scan(path, folder / "places"), name=str(path))


@pytest.mark.parametrize("form", ["jsonl", "webdataset", "parquet"])
def test_rows_by_number_are_those_of_the_plain_reader(tmp_path, form):
    for path in written(tmp_path, form):
        plain = list(open_source(path).rows)
        shard = opened(path, tmp_path)
        assert shard.scanned.rows == len(plain)
        for number in np.random.default_rng(0).permutation(len(plain)):
            where, row = shard.row(int(number))
            assert (where, row) == plain[number]


def test_strange_lines_are_told_as_the_plain_reader_does(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"a": 1}',
        b"{broken",
        b'{"a": "\xff"}',
        b"[1]",
        b'{"a": 2}\r',
        b'{"a": "' + b"x" * 3000 + b'"}',
    ]
    path.write_bytes(b"\n".join(lines))
    plain, shard = list(open_source(path, layout="rows").rows), opened(path, tmp_path)
    assert shard.scanned.rows == len(plain) == 6 and not shard.scanned.gaps
    for number, (where, row) in enumerate(plain):
        found = shard.row(number)
        assert found[0] == where and (str(found[1]) == str(row) if isinstance(row, DataError) else found[1] == row)
    path.write_bytes(b'\n{"a": 1}\n  \n\n{"a": 2}\n{bad\n\n')
    shard = opened(path, tmp_path)
    assert shard.scanned.rows == 3 and shard.scanned.gaps
    assert [shard.row(at)[1] for at in (0, 1)] == [{"a": 1}, {"a": 2}] and shard.row(2)[0] == f"{path}: byte 23"
    path.write_bytes(b"")
    assert opened(path, tmp_path).scanned.rows == 0


def test_a_broken_member_is_one_bad_row(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for number in range(4):
            name = "é" * 120 + f"{number}.json"  # long enough for a header before the header
            data = b"{nope" if number == 2 else json.dumps({"n": number}).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    shard = opened(tmp_path / "x.tar", tmp_path)
    found = [shard.row(at)[1] for at in (3, 2, 1, 0)]
    assert [one["n"] if isinstance(one, dict) else str(one)[:40] for one in found[::2]] == [3, 1]
    assert isinstance(found[1], DataError) and "cannot be read" in str(found[1]) and "x.tar:3" in str(found[1])


@pytest.mark.parametrize("name", ["a.tar", "a.parquet"])
def test_a_file_that_is_none_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such thing" * 100)
    with pytest.raises(DataError, match="broken file of rows"):
        scan(tmp_path / name, tmp_path / "places")


def test_files_of_a_set(tmp_path):
    for name in ("b.tar", "a.tar", ".hidden.tar", "readme.txt"):
        (tmp_path / name).touch()
    wanted = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert [one.place for one in entries_of(tmp_path)] == wanted
    assert [one.place for one in entries_of(tmp_path / "*.tar")] == wanted
    with pytest.raises(DataError, match="cannot be streamed"):
        entries_of(tmp_path / "readme.txt")
    with pytest.raises(DataError, match="no files of rows"):
        entries_of(tmp_path / "*.jsonl")
    shards = tmp_path / "shards.json"
    shards.write_text(json.dumps({"shardlist": ["a.tar", {"url": "s3://x/c.tar?v=1", "nsamples": 5}]}))
    local, far = entries_of(shards)
    assert local.place == wanted[0] and not local.remote and far.remote and far.rows == 5 and far.suffix == ".tar"
    for bad, message in (
        ({}, "no list `shardlist`"),
        ({"shardlist": [{"url": "../x.tar"}]}, "climbs out"),
        ({"shardlist": [{"url": "a.tar", "nsamples": -1}]}, "`nsamples` is -1"),
        ({"shardlist": [{"nsamples": 1}]}, "no `url`"),
        ({"shardlist": ["a.txt"]}, "cannot be streamed"),
    ):
        shards.write_text(json.dumps(bad))
        with pytest.raises(DataError, match=message):
            entries_of(shards)


def test_files_are_counted_once(tmp_path, monkeypatch):
    paths = written(tmp_path / "d", "webdataset")
    files = StreamFiles(tmp_path / "d" / "*.tar")
    assert files.count(QUIET, name="x") == (7, 7, 6)
    before = files.fingerprint
    monkeypatch.setattr(stream_files, "scan", lambda *_: pytest.fail("counted again"))
    again = StreamFiles(tmp_path / "d" / "*.tar")
    assert again.count(QUIET, name="x") == (7, 7, 6) and again.fingerprint == before
    monkeypatch.undo()
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    shutil.copy(paths[0], paths[2])
    changed = StreamFiles(tmp_path / "d" / "*.tar")
    assert changed.count(QUIET, name="x") == (7, 7, 7) and changed.fingerprint != before


class Far:
    """A place elsewhere: counts what is fetched, and how much the cache holds then."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = {path.name: path for path in paths}
        self.calls: list[str] = []
        self.most = 0

    def __call__(self, url: str, to: Path) -> None:
        self.calls.append(url)
        shutil.copy(self.paths[url.rpartition("/")[2]], to)
        held = [one for one in (cache_root() / "streams").rglob("*.tar")]
        self.most = max(self.most, sum(one.stat().st_size for one in held))


def listed(folder: Path, paths: list[Path], **told) -> Path:
    shards = [{"url": f"far://bucket/{path.name}", **told} for path in paths]
    (folder / "shards.json").write_text(json.dumps({"shardlist": shards}))
    return folder / "shards.json"


def test_fetched_shards_stay_within_the_bound(tmp_path):
    paths = written(tmp_path, "webdataset", 63)
    size = max(path.stat().st_size for path in paths)
    far = Far(paths)
    files = StreamFiles(listed(tmp_path, paths), fetch=far, limit=int(2.5 * size))
    assert files.count(QUIET, name="x") == (7,) * 9 and len(far.calls) == 9
    plain = [list(open_source(path).rows) for path in paths]
    for number in (3, 8, 3, 0, 8):
        shard = files.open(number)
        where, row = shard.row(2)
        assert where == f"far://bucket/{number}.tar:3" and row["id"] == plain[number][2][1]["id"]
    assert len(far.calls) == 9 + 3 and far.calls[9:] == [f"far://bucket/{at}.tar" for at in (3, 0, 8)]  # 8 was there
    assert far.most <= 2.5 * size
    with pytest.raises(ShardError, match="bytes"):
        StreamFiles(listed(tmp_path, paths[:1]), fetch=far, limit=size // 2).open(0)


def test_an_opened_shard_outlives_its_file(tmp_path):
    paths = written(tmp_path, "webdataset")
    files = StreamFiles(listed(tmp_path, paths), fetch=Far(paths), limit=1)
    files.limit = 10**9
    files.count(QUIET, name="x")
    shard = files.open(0)
    for path in files.folder.glob("*.tar"):
        path.unlink()
    sample = load_samples(DataSource(path=str(paths[0])), seed=0).samples[4]
    from mmft.data.dialects import RowContext, parse_messages

    where, row = shard.row(4)
    found = shard.with_media(parse_messages(row, where, 5, RowContext("x", files.folder, {}, None)))
    assert found.media[0].data is not None and media_digest(found.media[0]) == media_digest(sample.media[0])


def test_what_is_not_what_it_was_is_refused(tmp_path):
    paths = written(tmp_path, "webdataset")
    with pytest.raises(ShardError, match="nothing is fetched"):
        StreamFiles(listed(tmp_path, paths)).count(QUIET, name="x")
    with pytest.raises(ShardError, match="nsamples 8, found 7"):
        StreamFiles(listed(tmp_path, paths, nsamples=8), fetch=Far(paths)).open(0)
    far = Far(paths)
    files = StreamFiles(listed(tmp_path, paths[:2], nsamples=7), fetch=far)
    assert files.count(QUIET, name="x") == (7, 7) and not far.calls  # a list with counts is believed
    files.open(0)
    next(files.folder.glob("*.tar")).unlink()
    far.paths["0.tar"] = paths[1]
    with pytest.raises(ShardError, match="sha256 when it was last read"):
        files.open(0)

    def broken(url: str, to: Path) -> None:
        to.write_bytes(b"half")
        raise TimeoutError("no answer")

    files = StreamFiles(listed(tmp_path, paths[2:], nsamples=6), fetch=broken)
    with pytest.raises(ShardError, match="TimeoutError: no answer"):
        files.open(0)
    assert not [one for one in files.folder.iterdir() if one.suffix == ".tar"]
    with pytest.raises(ShardError, match="could not be fetched"):
        StreamFiles(listed(tmp_path, paths[2:], nsamples=6), fetch=lambda *_: None).open(0)
