"""Anonymous memory of a merge does not grow with the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.files import verify_folder
from tests.export.big import big_pair, watched_merge


def _growth(folder: Path, *, megabytes: int, **sizes: int) -> tuple[int, int]:
    base, adapter = big_pair(folder, megabytes=megabytes, **sizes)
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert total > 0.9 * megabytes * 10**6
    before, peak, seconds = watched_merge(base, adapter, folder / "merged")
    verify_folder(folder / "merged")
    print(f"{total / 1e6:.0f} MB merged in {seconds:.1f} s, anonymous memory +{(peak - before) / 1e6:.0f} MB")
    return total, peak - before


def test_200_mb(tmp_path: Path) -> None:
    _, growth = _growth(tmp_path, megabytes=200)
    assert growth < 120 * 2**20


@pytest.mark.slow
def test_1200_mb(tmp_path: Path) -> None:
    """With a 260 MB embedding matrix, larger than any block."""
    _, growth = _growth(tmp_path, megabytes=1200, hidden=2048, vocabulary=64000)
    assert growth < 300 * 2**20
