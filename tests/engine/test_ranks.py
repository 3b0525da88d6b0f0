"""Two processes over gloo compute, step by step, the loss and the gradients of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.engine.pairs import CASES, SHARDED, STEPS, WAYS
from tests.faults.trial import digest, ledger, run_of, same
from tests.runs import REPOSITORY, environment, read_lines

NEAR = 1e-6
_STOPPED = ("uninterrupted", "again", "alone")


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


EXTRA = pytest.mark.skipif("zero" not in WAYS, reason="needs the extra 'deepspeed'")
BY = ["two", pytest.param("zero", marks=EXTRA)]


@pytest.mark.parametrize("case", [*CASES, *SHARDED])
def test_two_processes_compute_the_steps_of_one(pairs: Path, case: str) -> None:
    _alike(pairs / case / "one", pairs / case / "two")


@EXTRA
@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_cut_up_by_deepspeed_compute_the_steps_of_one(pairs: Path, case: str) -> None:
    _alike(pairs / case / "one", pairs / case / "zero")
    for rank in (0, 1):
        held = json.loads((pairs / case / "zero" / f"held-{rank}.json").read_text())
        # The first layer waits for the next forward where no gradient passes its input.
        assert len(held) > 10 and not any(held[len(held) // 2 :]), "layers that were not let go after their backward"


def _alike(one: Path, two: Path) -> None:
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


@pytest.mark.parametrize("way", BY)
def test_a_run_that_is_cut_up_is_held_out_and_merged_like_any_other(pairs: Path, way: str) -> None:
    one, two = (run_of(pairs / "cut up" / world) for world in ("one", way))
    held = [[row["eval_loss"] for row in read_lines(run / "metrics.jsonl") if "eval_loss" in row] for run in (one, two)]
    assert len(held[0]) == 2 and held[1] == pytest.approx(held[0], rel=NEAR)
    ours, theirs = (load_file(run / "merged" / "model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    assert all(float((ours[name] - theirs[name]).abs().max()) <= 1e-6 for name in ours)
    (told,) = [event for event in read_lines(two / "events.jsonl") if event["kind"] == "shards"]
    assert (told["layers"], told["ranks"]) == (2, 2) and told["cut"] > 0.4 * (told["cut"] + told["whole"])


@pytest.mark.parametrize("way", BY)
def test_the_base_is_loaded_whole_only_where_a_merge_or_held_out_rows_need_it(pairs: Path, way: str) -> None:
    assert {case for case in SHARDED if (pairs / case / way / "restored").exists()} == {"cut up"}


@pytest.mark.parametrize("way", BY)
def test_a_run_that_is_cut_up_resumes_to_the_same_bytes(pairs: Path, way: str) -> None:
    whole, again, alone = (digest(run_of(pairs / f"stopped {way}" / name), step=STEPS) for name in _STOPPED)
    same(again, whole)
    assert [row[2] for row in alone["ledger"]] == [row[2] for row in whole["ledger"]]
    assert [row[1] for row in alone["ledger"]] == pytest.approx([row[1] for row in whole["ledger"]], rel=NEAR)


def test_the_cases_are_what_they_are_called(pairs: Path) -> None:
    first, second = _shown(pairs / "ranks without a picture" / "two", 2)
    kinds = {(any(one), any(other)) for one, other in zip(first, second, strict=True)}
    assert (True, False) in kinds and (False, True) in kinds, "a rank without a picture beside one with"
    (whole,) = _shown(pairs / "accumulation" / "one", 1)
    assert [len(forwards) for forwards in whole] == [6] * STEPS
    (whole,) = _shown(pairs / "packed" / "one", 1)
    assert max(len(forwards) for forwards in whole) < 8, "rows stand behind one another"
