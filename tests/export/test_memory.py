"""Anonymous memory of a merge does not grow with the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmft.files import verify_folder
from tests.export.big import big_pair, watched_merge

ROOM = 15 * 10**9  # bytes of disk for 6 GB, their merge, and what else happens meanwhile


def _growth(folder: Path, *, megabytes: int, limit: int = 0, **sizes: int) -> tuple[int, int]:
    base, adapter = big_pair(folder, megabytes=megabytes, **sizes)
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert total > 0.9 * megabytes * 10**6
    before, peak, seconds, _ = watched_merge(base, adapter, folder / "merged", limit=limit)
    verify_folder(folder / "merged")
    print(f"{total / 1e6:.0f} MB merged in {seconds:.1f} s, anonymous memory +{(peak - before) / 1e6:.0f} MB")
    return total, peak - before


def test_200_mb(tmp_path: Path) -> None:
    _, growth = _growth(tmp_path, megabytes=200)
    assert growth < 120 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [1200, 6000])
@pytest.mark.parametrize("limit", [0, 768 << 20], ids=["free", "768MB"])
def test_gigabytes(megabytes: int, limit: int, tmp_path: Path) -> None:
    """With a 260 MB embedding matrix, larger than any block; the limit is the kernel's, above what is imported."""
    if megabytes > 2000 and shutil.disk_usage(tmp_path).free < ROOM:
        pytest.skip(f"less than {ROOM / 1e9:.0f} GB of disk are free")
    try:
        _, growth = _growth(tmp_path, megabytes=megabytes, limit=limit, hidden=2048, vocabulary=64000)
    finally:
        shutil.rmtree(tmp_path)
    assert growth < 300 * 2**20
