"""A choice by the clock is made once for a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.fast.timed import kept_times


def test_what_was_timed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path))
    assert kept_times("a", lambda: (2.0, 1.0)) == (2.0, 1.0)
    assert kept_times("a", lambda: (1.0, 9.0)) == (2.0, 1.0)
    assert kept_times("b", lambda: (1.0, 9.0)) == (1.0, 9.0)


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"a": 3}', '{"a": ["x", 1]}'])
def test_a_broken_file_is_made_anew(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path))
    (tmp_path / "timed.json").write_text(text)
    assert kept_times("a", lambda: (2.0, 1.0)) == (2.0, 1.0)
    assert kept_times("a", lambda: (1.0, 9.0)) == (2.0, 1.0)
