"""kill -9 during a merge: the folder is absent or whole, and the next merge cleans up."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from mmft.export.merge import merge_adapter
from mmft.files import verify_folder
from tests.export import zoo
from tests.export.big import big_pair


def _merge_in_child(base: Path, adapter: Path, out: Path) -> int:
    child = os.fork()  # a real process, without the seconds of imports
    if child == 0:
        try:
            merge_adapter(base, adapter, out, max_shard_size="10MB")
        finally:
            os._exit(0)
    return child


def test_killed_at_random_times(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base, adapter = big_pair(tmp_path, megabytes=60)
    started = time.monotonic()
    os.waitpid(_merge_in_child(base, adapter, tmp_path / "whole"), 0)
    whole = time.monotonic() - started
    verify_folder(tmp_path / "whole")
    draw = random.Random(0)
    absent = 0
    for attempt in range(10):
        out = tmp_path / f"out{attempt}"
        child = _merge_in_child(base, adapter, out)
        time.sleep(draw.uniform(0.0, 1.0) * whole)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            verify_folder(out)
        else:
            absent += 1
    assert absent >= 3
    merge_adapter(base, adapter, tmp_path / "last", max_shard_size="10MB")
    assert not list(tmp_path.glob(".*.tmp"))
    want, got = zoo.load(tmp_path / "whole").state_dict(), zoo.load(tmp_path / "last").state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
