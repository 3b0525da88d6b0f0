"""Shards that are hashed and synced while others are made: bytes and digests, and nothing open after a failure."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from mmft.errors import CheckpointError, ExportError
from mmft.export import writer
from mmft.export.shards import Output, as_bytes
from mmft.export.writer import hashed_folder, write_shards
from mmft.files import verify_folder

TENSORS = {f"t{n}": torch.randn(100 + n, 64).to([torch.bfloat16, torch.float32][n % 2]) for n in range(24)}


def _shards(per_file: int) -> dict[str, list[Output]]:
    names = list(TENSORS)
    groups = [names[at : at + per_file] for at in range(0, len(names), per_file)]
    return {
        f"model-{n:05d}-of-{len(groups):05d}.safetensors": [
            Output(name, TENSORS[name].dtype, tuple(TENSORS[name].shape)) for name in group
        ]
        for n, group in enumerate(groups, 1)
    }


def _pieces(output: Output) -> Iterator[memoryview]:
    whole = as_bytes(TENSORS[output.name])
    for start in range(0, len(whole), 1000):
        yield whole[start : start + 1000]


def _handles() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and path.exists()}


@pytest.mark.parametrize("per_file", [24, 1, 5])
@pytest.mark.parametrize("ahead", [16 << 20, 1500], ids=["thread writes", "caller writes"])
def test_bytes_and_digests(per_file: int, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_AHEAD", ahead)
    shards = _shards(per_file)
    with hashed_folder(tmp_path / "out") as (folder, known):
        known.update(write_shards(folder, shards, _pieces))
    verify_folder(tmp_path / "out")
    found = {}
    for file in shards:
        data = (tmp_path / "out" / file).read_bytes()
        assert known[file] == {"bytes": len(data), "blake3": blake3(data).hexdigest()}
        found |= load_file(tmp_path / "out" / file)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)
    index = tmp_path / "out/model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if index.exists():
        assert json.loads(index.read_bytes())["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_the_disk_is_waited_for_beside_the_next_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an fsync of 0.2 s, 24 files take six waits of four, not 24."""
    sync = os.fsync
    alive = []

    def slow(handle: int) -> None:
        alive.append(threading.active_count())
        time.sleep(0.2)
        sync(handle)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", slow)
    started = time.monotonic()
    shards = {name.replace("of-00024", "of-00001"): outputs for name, outputs in _shards(1).items()}
    known = write_shards(tmp_path / "out", shards, _pieces)
    assert len(known) == 24 and time.monotonic() - started < 24 * 0.2 * 0.6
    assert max(alive) <= threading.active_count() + 4


@pytest.mark.parametrize("at", [0, 7, 23])
@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_an_error_of_a_thread_reaches_the_caller_and_leaves_nothing(
    call: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name = getattr(os, call), list(_shards(1))[at]

    def failing(handle: int, *rest: object) -> object:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(name):
            raise OSError(28, "No space left on device")
        return real(handle, *rest)

    monkeypatch.setattr(os, call, failing)
    before, threads = _handles(), threading.active_count()
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        hashed_folder(tmp_path / "out") as (folder, _),
    ):
        write_shards(folder, _shards(1), _pieces)
    assert not list(tmp_path.iterdir()) and _handles() == before and threading.active_count() == threads


def test_a_wrong_number_of_bytes_leaves_nothing(tmp_path: Path) -> None:
    before, threads = _handles(), threading.active_count()

    def pieces(output: Output) -> Iterator[memoryview]:
        yield from _pieces(output)
        if output.name == "t9":
            yield memoryview(b"one more")

    size = TENSORS["t9"].nbytes
    text = f"tensor t9: {size + 8} bytes came, {size} were planned"
    with pytest.raises(ExportError, match=text), hashed_folder(tmp_path / "out") as (folder, _):
        write_shards(folder, _shards(1), pieces)
    assert not list(tmp_path.iterdir()) and _handles() == before and threading.active_count() == threads
