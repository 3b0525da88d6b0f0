"""`make bench-curve`: a row's line says how far curves are apart, and a run of any precision gives its curve."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.bench.bench_curve import HEAD, line, losses


def test_a_line_tells_the_noise_of_both_paths_and_their_distance():
    curves = {
        "plain": [10.0, 9.03, 8.5],
        "all": [10.0, 9.01, 8.4],
        "plain32": [10.0, 9.0],
        "all32": [10.0, 9.0001],
    }
    found = line("llava:vqa", curves).split()
    assert found[1:4] == ["10.00000"] * 3 and found[4] == "0.10000" and found[5] == "0.04000"
    assert found[6:] == ["0.02121", "0.00707", "1.0e-04"]
    assert len(HEAD.split()) == len(found) + 1


def test_a_run_of_either_precision_gives_its_curve(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path))
    model, rows = tiny.save_tiny_vlm(tmp_path / "model"), tiny.tiny_rows(tmp_path / "rows", 4)
    given = {"model": str(model), "rows": str(rows), "batch": 2, "steps": 2}
    exact = losses(given, fast=False, float32=True)
    assert len(exact) == 2 and losses(given, fast=True, float32=True) == pytest.approx(exact, rel=1e-5)
    half = losses(given, fast=False, float32=False)
    assert half != exact and half == pytest.approx(exact, abs=0.1)
