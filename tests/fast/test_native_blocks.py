"""A gap in the heap is filled again by a tensor of the shape that left it; everything else is as torch has it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch

from mmft.fast import kernel_caches, native_blocks
from mmft.fast.native_build import NoKernels
from mmft.fast.plan import fast_plan
from tests.fast.helpers import workplace
from tests.runs import environment

pytestmark = pytest.mark.skipif(native_blocks.why_not() is not None, reason=str(native_blocks.why_not()))
FORWARD = """
import ctypes, json, sys
import torch
from mmft.fast import native_blocks

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
libc.mallopt(-3, 1 << 25)  # as after a large tensor was freed
if sys.argv[1] == "blocks":
    native_blocks.put_in()
grown, held = [], []
for size in range(258_048, 258_048 + 64, 8):
    begin, kept = libc.mallinfo2().arena, []
    for layer in range(400):  # of pages that nobody touches
        first, *small = torch.empty(size, dtype=torch.bfloat16), torch.empty(3), torch.empty(9)
        kept += [torch.empty(size, dtype=torch.bfloat16), *small]
        del first, small
    grown.append((libc.mallinfo2().arena - begin) / sum(one.nbytes for one in kept))
    held += kept  # what was free is not free for the next size
print(json.dumps(grown))
"""


@pytest.fixture
def blocks():
    """Tensors are blocks until the test's end."""
    out = native_blocks.put_in()
    yield
    out()


def is_block(x: torch.Tensor) -> bool:
    """Whether its block's beginning lies before its values."""
    at = x.data_ptr()
    return 0 < at - ctypes.c_uint64.from_address(at - 8).value <= 72


def _grown(word: str) -> float:
    """What the heap grew by in a forward, for each byte that stays for backward: the most for tensors of some sizes.
    (Whether a gap is too narrow for its own shape also depends on what small pieces lie beside it.)"""
    words = [sys.executable, "-c", FORWARD, word]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return max(json.loads(done.stdout.splitlines()[-1]))


def test_a_gap_is_filled_by_a_tensor_of_the_same_shape():
    """Each layer makes two tensors and keeps the second."""
    assert _grown("blocks") < 1.1
    assert any(_grown("plain") > 1.5 for _ in range(6))  # by chance one process in four leaves no gap at all


@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 1000, 4096, 100_003, 9_000_000])
def test_values_and_alignment(blocks, size):
    """Aligned as torch aligns, whole to the last byte, of any use that memory is put to."""
    every = [torch.full((size,), number, dtype=torch.uint8) for number in range(4)]
    assert all(is_block(one) and one.data_ptr() % 64 == 0 for one in every)
    assert all(bool((one == number).all()) for number, one in enumerate(every))
    shared = every[1].numpy()
    shared[-1] = 9
    assert every[1][-1] == 9 and every[2].clone().sum() == 2 * size
    every[3].resize_(3 * size)
    assert is_block(every[3]) and bool((every[3][:size] == 3).all())
    assert torch.from_numpy(numpy.ones(size)).sum() == size and torch.empty(0).numel() == 0


def test_operators_with_memory_of_their_own(blocks):
    """oneDNN asks the allocator for addresses, not for tensors."""
    source = torch.Generator().manual_seed(0)
    x, weight = torch.randn((2, 3, 32, 32), generator=source), torch.randn((8, 3, 4, 4), generator=source)
    found = torch.nn.functional.conv2d(x.bfloat16(), weight.bfloat16(), stride=4)
    assert torch.allclose(found.float(), torch.nn.functional.conv2d(x, weight, stride=4), rtol=0.05, atol=0.3)


def test_refused_memory_is_told_as_torch_tells_it(blocks):
    for size in (1 << 60, (1 << 63) - 8):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(size, dtype=torch.uint8)


def test_the_profiler_sees_blocks(blocks):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        x = torch.empty(50_000)
        del x
    told = {event.name: event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage}
    assert told.pop("aten::empty") == 200_000 and told == {"[memory]": -200_000}


def test_a_run_has_them_and_leaves_none_behind(tmp_path):
    _, setting, work = workplace(tmp_path)
    assert "fit again" in fast_plan(setting, [kernel_caches.CANDIDATE]).rows[0].reason
    before = torch.ones(9)
    work = kernel_caches.install(setting, work)
    within = torch.ones(9)
    assert is_block(within) and not is_block(before)
    work.release()
    assert not is_block(torch.ones(9)) and torch.equal(within, before)  # one that is there stays what it is


@pytest.mark.parametrize(
    "missing", ["a compiler", "a compiler that works", "glibc", "torch's own alignment", "headers"]
)
def test_without_them_the_plan_says_so_and_the_run_goes_on(tmp_path, monkeypatch, missing):
    _, setting, work = workplace(tmp_path)
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    native_blocks.library.cache_clear()
    if missing == "a compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif missing == "a compiler that works":
        (tmp_path / "g++").write_text('#!/bin/sh\n[ "$1" = -v ] || { echo "error: no" >&2; exit 1; }\n')
        (tmp_path / "g++").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    elif missing == "glibc":
        monkeypatch.setattr(native_blocks.platform, "libc_ver", lambda: ("musl", "1"))
    elif missing == "headers":
        monkeypatch.setattr(native_blocks, "_torch", lambda: tmp_path)
    else:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    told = {
        "a compiler": "no g++",
        "a compiler that works": "cannot build them .error: no",
        "glibc": "does not come from glibc",
        "headers": "without its headers",
        "torch's own alignment": "THP_MEM_ALLOC_ENABLE is set",
    }[missing]
    with pytest.raises(NoKernels, match=told):
        native_blocks.put_in()
    work = kernel_caches.install(setting, replace(work, notes={}))
    assert re.search(told, work.notes["kernel_caches"][0])
    assert not is_block(torch.ones(9)) and not work.undo
    native_blocks.library.cache_clear()
