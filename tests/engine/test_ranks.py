"""Two processes over gloo compute, step by step, the loss and the gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.engine.pairs import CASES, STEPS
from tests.faults.trial import ledger, run_of
from tests.runs import REPOSITORY, environment

NEAR = 1e-6


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs, made in a process of its own: they are forked before torch has threads."""
    out = tmp_path_factory.mktemp("pairs")
    words = [sys.executable, "-m", "tests.engine.pairs", str(out)]
    done = subprocess.run(words, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def _shown(place: Path, ranks: int) -> list[list[list[bool]]]:
    """Whether a forward showed pictures, by rank, step and forward."""
    return [json.loads((place / f"shown-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_the_steps_of_one(pairs: Path, case: str) -> None:
    one, two = pairs / case / "one", pairs / case / "two"
    ours, theirs = ledger(run_of(two)), ledger(run_of(one))
    assert len(ours) == len(theirs) == STEPS
    assert [row[2] for row in ours] == [row[2] for row in theirs], "supervised tokens"
    assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], rel=NEAR)
    for step in range(1, STEPS + 1):
        found, wanted = (load_file(place / f"step-{step}.safetensors") for place in (two, one))
        assert found.keys() == wanted.keys(), "a gradient that one process does not have"
        largest = max(float(value.abs().max()) for value in wanted.values())
        for name, value in wanted.items():
            assert float((found[name] - value).abs().max()) <= NEAR * largest, (step, name)


def test_the_cases_are_what_they_are_called(pairs: Path) -> None:
    first, second = _shown(pairs / "ranks without a picture" / "two", 2)
    kinds = {(any(one), any(other)) for one, other in zip(first, second, strict=True)}
    assert (True, False) in kinds and (False, True) in kinds, "a rank without a picture beside one with"
    (whole,) = _shown(pairs / "accumulation" / "one", 1)
    assert [len(forwards) for forwards in whole] == [6] * STEPS
    (whole,) = _shown(pairs / "packed" / "one", 1)
    assert max(len(forwards) for forwards in whole) < 8, "rows stand behind one another"
