"""The guard against forgetting: it warns or stops when the probe set falls too far, and is silent when it does not."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import mmft
from mmft.errors import RecipeError
from mmft.summary import summary_text
from tests.objectives.pairs import COLOURS, pair_rows, values
from tests.runs import read_lines, run_process, workshop

PROBE = {"objective.probe_set": "held", "train.eval_steps": 2, "train.max_steps": 8, "export.merge": False}


@functools.cache
def _learned() -> Path:
    """A model that knows the colours: R@1 on `held` is far above chance."""
    folder = workshop() / "forgetting-base"
    changes = {"train.max_steps": 40, "train.save_steps": 0, "evaluate.models": ["adapter"]}
    report = mmft.train(values(folder, changes), quiet=True)
    assert report["scores"]["adapter"]["image_to_text_r@1"]["value"] >= 0.75
    return folder / "runs" / "pairs" / "merged"


@functools.cache
def _wrong_names() -> Path:
    """The training pictures under the names of other colours: learning them is forgetting."""
    folder = workshop() / "wrong-names"
    shutil.copytree(pair_rows().parent, folder, dirs_exist_ok=True)
    names, lines = list(COLOURS), []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        other = names[(names.index(row["group"]) + 3) % len(names)]
        lines.append(json.dumps({"id": row["id"], "image": row["image"], "group": other, "captions": [other]}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def _recipe(tmp_path: Path, **changes: object) -> dict:
    told = {key.replace("__", "."): value for key, value in changes.items()}
    return values(tmp_path, {**PROBE, "model.name_or_path": str(_learned()), **told})


def _probe(tmp_path: Path) -> tuple[Path, dict, list[float]]:
    run = tmp_path / "runs" / "pairs"
    rows = [row["probe_r@1"] for row in read_lines(run / "metrics.jsonl") if "probe_r@1" in row]
    return run, json.loads((run / "probe.json").read_text()), rows


def test_it_warns_when_the_probe_set_falls(tmp_path):
    report = mmft.train(_recipe(tmp_path, data__train=[{"path": str(_wrong_names())}]), quiet=True)
    run, probe, rows = _probe(tmp_path)
    assert probe["before"] == rows[0] >= 0.75 and min(rows) < rows[0] - 0.05
    assert probe["fallen_at"] in (2, 4, 6, 8) and list(probe["scores"]) == ["0", "2", "4", "6", "8"]
    assert report["probe"] == probe and report["training"]["steps"] == 8 and report["training"]["stopped"] is None
    assert [row["kind"] for row in read_lines(run / "events.jsonl")].count("forgetting") >= 1
    page = (run / "report.html").read_text()
    assert "Probe set: R@1" in page
    line = next(line for line in summary_text(report).splitlines() if line.startswith("probe held"))
    assert f"it fell further at step {probe['fallen_at']}" in line


def test_it_stops_when_the_recipe_says_so(tmp_path):
    changes = {"data__train": [{"path": str(_wrong_names())}], "objective__probe_action": "stop"}
    report = mmft.train(_recipe(tmp_path, train__max_steps=40, **changes), quiet=True)
    run, probe, _ = _probe(tmp_path)
    assert report["training"]["steps"] == probe["fallen_at"] < 40
    assert report["training"]["stopped"].startswith("probe held: R@1 fell from ")
    assert "more than objective.probe_max_drop 0.05" in (run / "report.html").read_text()


def test_it_is_silent_when_nothing_is_forgotten(tmp_path):
    report = mmft.train(_recipe(tmp_path, objective__probe_action="stop", train__learning_rate=1e-5), quiet=True)
    run, probe, rows = _probe(tmp_path)
    assert probe["fallen_at"] is None and rows == [probe["before"]] * 5
    assert report["training"]["steps"] == 8 and report["training"]["stopped"] is None
    assert "forgetting" not in [row["kind"] for row in read_lines(run / "events.jsonl")]


def test_a_resumed_run_falls_from_the_first_height(tmp_path):
    changes = {"data__train": [{"path": str(_wrong_names())}], "train__save_steps": 4}
    mmft.train(_recipe(tmp_path, **changes), quiet=True)
    run, probe, _ = _probe(tmp_path)
    shutil.rmtree(run / "checkpoints" / "step-000008")
    shutil.rmtree(run / "adapter")
    (run / "report.json").unlink()
    mmft.train(_recipe(tmp_path, **changes), resume=True, quiet=True)
    again = json.loads((run / "probe.json").read_text())
    assert again["before"] == probe["before"] and again["scores"] == probe["scores"]


@pytest.mark.slow
def test_two_processes_stop_where_one_does(tmp_path):
    """With the features of the locked tower kept: every rank has its own memory and the same bits."""
    changes = {
        "data__train": [{"path": str(_wrong_names())}],
        "objective__probe_action": "stop",
        "objective__cache_features": True,
        "adapter__targets": ["vision.attention", "vision.mlp"],
        "adapter__lora_dropout": 0.0,
        "train__max_steps": 40,
        "evaluate__models": ["adapter"],
    }
    mmft.train(_recipe(tmp_path / "one", **changes), quiet=True)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(_recipe(tmp_path / "two", **changes)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outcome = run_process(*launch, "-m", "mmft", "train", path, ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err[-3000:]
    one, two = (_probe(tmp_path / name)[1] for name in ("one", "two"))
    assert one["fallen_at"] == two["fallen_at"] is not None and one["scores"] == two["scores"]


def test_the_probe_set_must_exist_and_be_looked_at(tmp_path):
    with pytest.raises(RecipeError, match="names no evaluation set: hold"):
        mmft.train(_recipe(tmp_path, objective__probe_set="hold"), quiet=True)
    with pytest.raises(RecipeError, match=r"watched at every evaluation, and train\.eval_steps is 0"):
        mmft.validate(_recipe(tmp_path, train__eval_steps=0))
