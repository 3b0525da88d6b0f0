"""Loss by data set with two processes: what one process tells. Joint heads, dual learning, online runs, preferences and
contrastive pairs are looked at in their own tests of two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.faults.trial import run_of
from tests.objectives.ranks import NAMES
from tests.runs import REPOSITORY, environment, read_lines


def test_two_processes_tell_the_losses_of_one(tmp_path):
    words = [sys.executable, "-m", "tests.objectives.ranks", str(tmp_path)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in NAMES:
        one, two = (
            [row for row in read_lines(run_of(tmp_path / name / world) / "metrics.jsonl") if "loss" in row]
            for world in ("one", "two")
        )
        assert len(one) == len(two) == 3, name
        for left, right in zip(one, two, strict=True):
            told = [key for key in left if key.startswith(("loss/", "terms/"))]
            assert {key for key in right if key.startswith(("loss/", "terms/"))} == set(told)
            assert [right[key] for key in told] == pytest.approx([left[key] for key in told], rel=1e-5), name
            sets = [key.removeprefix("loss/") for key in told if key.startswith("loss/")]
            total = sum(right[f"loss/{key}"] * right[f"terms/{key}"] for key in sets)
            assert total / sum(right[f"terms/{key}"] for key in sets) == pytest.approx(right["loss"], rel=1e-5), name
        assert len({key for row in one for key in row if key.startswith("loss/")}) == 2, name
