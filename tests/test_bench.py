"""`make bench`'s arms of packages that live elsewhere: told apart from those that are there, given the same rows."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.bench import bench, peers


def asked(*arms: str, peer: tuple[str, ...] = (), workload: str = "llava", data: str = "vqa") -> argparse.Namespace:
    return argparse.Namespace(arms=list(arms), peer=list(peer), workload=workload, data=data, epochs=1)


@pytest.mark.parametrize("python", [None, sys.executable, "/no/such/python"])
def test_a_peer_that_is_not_there_is_said_and_left_out(python, capsys):
    given = asked("hf", "swift", "all", peer=() if python is None else (f"swift={python}",))
    assert list(bench.arms_of(given)) == ["hf", "all"]
    assert capsys.readouterr().out == "swift: not installed\n"


def test_without_names_every_peer_that_is_not_there_is_said(capsys):
    assert not set(bench.arms_of(asked())) & set(peers.PEERS)
    assert [f"{name}: not installed" for name in peers.PEERS] == capsys.readouterr().out.splitlines()[
        -len(peers.PEERS) :
    ]


def test_a_peer_that_is_there_runs_by_its_own_python(tmp_path: Path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    found = bench.arms_of(asked("llamafactory-packed", "swift", peer=(f"llamafactory={python}",)))
    assert found == {
        "llamafactory-packed": {"arm": "llamafactory", "packed": True, "python": str(python), "fast": False}
    }
    assert capsys.readouterr().out == "swift: not installed\n"
    with pytest.raises(SystemExit, match="no arm is left"):
        bench.arms_of(asked("swift", peer=(f"swift={python}",), workload="smolvlm"))
    assert capsys.readouterr().out == "swift: with --workload llava only\n"


def test_unknown_names_stop():
    with pytest.raises(SystemExit, match="no peer named axolotl; there are swift and llamafactory"):
        bench.arms_of(asked(peer=("axolotl=python",)))
    with pytest.raises(SystemExit, match="no arm named swiff"):
        bench.arms_of(asked("swiff"))


def test_a_peer_gets_the_rows_in_the_order_of_every_arm(tmp_path: Path):
    model = tiny.save_tiny_vlm(tmp_path / "model")
    rows = tiny.tiny_rows(tmp_path / "rows", 6)
    told = {"arm": "swift", "model": str(model), "rows": str(rows), "batch": 2, "steps": 5, "fast": False}
    once, again = (peers.prepare(told, tmp_path / name) for name in ("once", "again"))
    lines = [json.loads(line) for line in Path(once["rows"]).read_text().splitlines()]
    assert Path(again["rows"]).read_text() == Path(once["rows"]).read_text()
    assert len(lines) == 10 and once["train"]["max_steps"] == 5
    pictures = [Path(line["images"][0]) for line in lines]
    assert all(one.is_absolute() and one.exists() for one in pictures)
    assert len(set(pictures[:6])) == 6 and [one.name for one in pictures[:6]] != [f"0-{at}.png" for at in range(6)]
    assert lines[0]["messages"][0] == {"role": "user", "content": "<image>Which colour?"}
    assert lines[0]["messages"][1]["content"] in tiny.COLOURS


def test_rows_in_other_steps_are_compared_by_their_mean():
    one = {"samples_per_second": 1.0, "tokens_per_sample": 240.0, "peak": 1e9}
    theirs, ours = [{**one, "losses": [3.0, 1.0]}], [{**one, "losses": [1.0, 3.0]}]
    given = asked()
    assert "NOT VALID" in bench.table({"hf": theirs, "other": ours}, given, 1e12)[-1]
    assert "NOT VALID" not in bench.table({"hf": theirs, "other": [{**ours[0], "reordered": True}]}, given, 1e12)[-1]
