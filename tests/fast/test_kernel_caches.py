"""oneDNN's caches are bounded before the first product, stay what a user set, and no number depends on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mmft.fast import kernel_caches

LENGTHS = 150
SCRIPT = f"""
import ctypes, json, os, sys
import torch
from mmft.fast import kernel_caches

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap

def held():
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd

torch.manual_seed(0)
if sys.argv[1] == "bounded":
    kernel_caches.bound()
weight = torch.randn(96, 64).bfloat16()
rows = torch.randn(600, 64).bfloat16()
begin, total = held(), 0.0
for length in range(200, 200 + {LENGTHS}):
    total += float(torch.nn.functional.linear(rows[:length], weight).float().sum())
kernel_caches.give_back()
print(json.dumps([held() - begin, total, os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")]))
"""


def _run(word: str, **more: str) -> list:
    clean = {name: value for name, value in os.environ.items() if name not in kernel_caches.BOUNDS}
    done = subprocess.run([sys.executable, "-c", SCRIPT, word], env={**clean, **more}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _bf16_products() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.skipif(not _bf16_products(), reason="oneDNN makes no bf16 products on this processor")
def test_products_of_many_lengths_are_not_all_kept():
    bounded, without = _run("bounded"), _run("free")
    assert without[0] > 1.5 * bounded[0] and without[0] - bounded[0] > LENGTHS / 2 * 300_000
    assert bounded[1] == without[1]  # the same products, to the last bit


def test_what_a_user_set_stays(monkeypatch):
    assert _run("bounded", ONEDNN_PRIMITIVE_CACHE_CAPACITY="500")[2] == "500"
    assert _run("bounded")[2] == str(kernel_caches.PRODUCTS)
    monkeypatch.setattr(kernel_caches, "on_cpu", lambda _: False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "500")
    holds, reason = kernel_caches.holds(None)  # type: ignore[arg-type]
    assert not holds and "ONEDNN_PRIMITIVE_CACHE_CAPACITY is set" in reason
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernel_caches.PRODUCTS))
    assert kernel_caches.holds(None)[0]  # type: ignore[arg-type]
