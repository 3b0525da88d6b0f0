"""Slabs: what was put is read back, by other readers too; torn entries are misses; the bound holds."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest
import torch

from mmft.fast import slabs as slabs_module
from mmft.fast.slabs import Slabs, evict, held
from mmft.paths import cache_limit

MANY = 10**9


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def entry(number: int, size: int = 100) -> dict[str, torch.Tensor]:
    values = torch.randn(size, 3, generator=torch.Generator().manual_seed(number))
    return {"a/0": values.to(torch.bfloat16), "ids": torch.arange(5, dtype=torch.int32), "none": torch.zeros(0, 4)}


def same(one: dict[str, torch.Tensor] | None, two: dict[str, torch.Tensor]) -> bool:
    assert one is not None and list(one) == list(two)
    return all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in two)


def test_what_was_put_is_read_by_every_reader(tmp_path, monkeypatch):
    writer, reader = Slabs(tmp_path, limit=MANY), Slabs(tmp_path, limit=MANY)
    assert writer.put(key(1), entry(1)) and not writer.put(key(1), entry(1))
    assert same(writer.get(key(1)), entry(1)) and writer.get(key(2)) is None
    monkeypatch.setattr(slabs_module, "_LOOK_AGAIN", 0.0)
    assert same(reader.get(key(1)), entry(1))
    writer.put(key(2), entry(2))
    assert same(reader.get(key(2)), entry(2)), "the slab has grown"
    assert reader.put(key(3), entry(3)) and same(writer.get(key(3)), entry(3))
    assert len(list(tmp_path.glob("*.slab"))) == 2, "two writers never share a file"
    assert len(Slabs(tmp_path, limit=MANY)) == 3


@pytest.mark.parametrize("damage", ["bit", "tail", "half a head", "empty"])
def test_a_torn_entry_is_never_read(tmp_path, damage):
    slabs = Slabs(tmp_path, limit=MANY)
    for number in (1, 2):
        slabs.put(key(number), entry(number))
    (path,) = tmp_path.glob("*.slab")
    data = bytearray(path.read_bytes())
    size = len(data) // 2
    if damage == "bit":
        data[size + 500] ^= 1
    path.write_bytes(data[: {"bit": 2 * size, "tail": 2 * size - 7, "half a head": size + 20, "empty": 0}[damage]])
    again = Slabs(tmp_path, limit=MANY)
    assert again.get(key(2)) is None
    assert damage == "empty" or same(again.get(key(1)), entry(1))
    assert again.torn == (damage == "bit")
    assert again.put(key(2), entry(2)) and same(again.get(key(2)), entry(2)), "it is stored anew, in another slab"


def test_the_longest_unused_goes_and_what_this_run_uses_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs_module, "SLAB_BYTES", 4096)
    old = Slabs(tmp_path / "old", limit=MANY, root=tmp_path)
    for number in range(30):
        old.put(key(number), entry(number))
    for at, path in enumerate(sorted((tmp_path / "old").glob("*.slab"), key=lambda one: int(one.stem.split("-")[-1]))):
        os.utime(path, (1000 + at, 1000 + at))
    (tmp_path / "fused.safetensors").write_bytes(bytes(4096))
    os.utime(tmp_path / "fused.safetensors", (500, 500))
    limit = held(tmp_path) + 4096
    reader = Slabs(tmp_path / "old", limit=limit, root=tmp_path)
    assert reader.get(key(0)) is not None, "used: the first slab is the newest now"
    new = Slabs(tmp_path / "new", limit=limit, root=tmp_path)
    for number in range(100, 115):
        assert new.put(key(number), entry(number))
    assert held(tmp_path) <= limit
    assert not (tmp_path / "fused.safetensors").exists(), "the longest unused went first, whatever wrote it"
    left = Slabs(tmp_path / "old", limit=limit, root=tmp_path)
    assert left.get(key(0)) is not None and left.get(key(29)) is not None and left.get(key(6)) is None
    assert same(new.get(key(100)), entry(100))


def test_a_full_cache_stores_no_more_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs_module, "SLAB_BYTES", 4096)
    slabs = Slabs(tmp_path, limit=5 * 4096)
    stored = [slabs.put(key(number), entry(number)) for number in range(60)]
    assert stored[0] and not stored[-1] and held(tmp_path) <= 5 * 4096
    assert "MMFT_CACHE_SIZE" in (slabs.full or "")
    assert same(slabs.get(key(0)), entry(0)), "what the run uses is not thrown out"


def test_a_full_disk_ends_storing_not_the_run(tmp_path, monkeypatch):
    slabs = Slabs(tmp_path, limit=MANY)
    monkeypatch.setattr(slabs_module, "free_bytes", lambda path: 10)
    assert not slabs.put(key(1), entry(1)) and slabs.full and slabs.get(key(1)) is None


def test_a_file_that_goes_while_it_is_open_is_a_miss_or_whole(tmp_path):
    slabs, other = Slabs(tmp_path, limit=MANY), Slabs(tmp_path, limit=MANY)
    slabs.put(key(1), entry(1))
    assert same(slabs.get(key(1)), entry(1))
    assert evict(tmp_path, limit=0)
    assert same(slabs.get(key(1)), entry(1)), "mapped: the bytes live on"
    assert other.get(key(1)) is None


def test_a_cache_that_is_deleted_while_it_is_used_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs_module, "_LOOK_AGAIN", -1.0)
    slabs = Slabs(tmp_path / "cache", limit=MANY)
    shutil.rmtree(tmp_path / "cache")
    assert slabs.get(key(1)) is None
    with pytest.warns(UserWarning, match="nothing more is stored"):
        assert not slabs.put(key(1), entry(1))


@pytest.mark.parametrize(("text", "size"), [("20GB", 20 * 10**9), ("500mb", 5 * 10**8), ("1234", 1234)])
def test_the_bound_is_a_size(monkeypatch, text, size):
    monkeypatch.setenv("MMFT_CACHE_SIZE", text)
    assert cache_limit() == size
