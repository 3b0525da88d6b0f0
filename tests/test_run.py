"""Whole runs: what they write, that other tools read it, that nothing is overwritten, that kills change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmft
from mmft.errors import CheckpointError, DataError
from tests.runs import (
    BIN,
    LONG,
    TRAIN_ONLY,
    adapter_sha,
    answer_of,
    cli,
    environment,
    finished,
    hashes,
    model,
    read_lines,
    rows,
    run_process,
    stable,
    trained_only,
    wait_for_step,
    write_recipe,
)
from tests.tiny import tiny_rows

FILES = ["recipe.yaml", "run.json", "events.jsonl", "metrics.jsonl", "training.json", "predictions.jsonl"]
FILES += ["report.json", "report.html"]

# What a user without mmft does: transformers and peft alone, one row at a time, by the model's own chat template.
PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
run, base, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
records = [json.loads(line) for line in open(run + "/predictions.jsonl")]


def answers(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    for record in records:
        content = [{"type": "image", "path": record["images"][0]}, {"type": "text", "text": record["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        new = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        yield processor.decode(new, skip_special_tokens=True).strip()


found = {}
merged = AutoModelForImageTextToText.from_pretrained(run + "/merged", dtype=dtype)
found["merged"] = list(answers(merged, run + "/merged"))
model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
found["base"] = list(answers(model, base))
found["adapter"] = list(answers(PeftModel.from_pretrained(model, run + "/adapter"), base))
found["foreign"] = [name for name in sys.modules if name.split(".")[0] == "mmft"]
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_run_leaves_everything_and_its_scores_are_those_of_its_answers(kind: str) -> None:
    done = finished(kind)
    assert [name for name in FILES if not (done.run / name).is_file()] == []
    assert sorted(path.name for path in (done.run / "checkpoints").iterdir()) == ["step-000080", "step-000160"]
    assert (done.run / "adapter" / "adapter_model.safetensors").is_file()
    assert (done.run / "merged" / "model.safetensors").is_file()
    assert json.loads((done.run / "report.json").read_text()) == done.report
    assert [row["step"] for row in read_lines(done.run / "metrics.jsonl") if "loss" in row] == list(range(1, 161))
    assert mmft.validate(done.run / "recipe.yaml") == mmft.validate(done.recipe)

    predictions = done.predictions()
    held = [json.loads(line) for line in rows(8, 1).read_text().splitlines()]
    assert [(p["id"], p["references"], p["tags"]) for p in predictions] == [
        (row["id"], [answer_of(row)], row["tags"]) for row in held
    ]
    for which in ("base", "adapter", "merged"):
        right = [p["answers"][which] == p["references"][0] for p in predictions]
        score = done.report["scores"][which]["exact_match"]
        assert score["value"] == pytest.approx(sum(right) / 8)
        assert score["n"] == 8
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
        for kind_of_row in ("warm", "cold"):
            chosen = [hit for hit, p in zip(right, predictions, strict=True) if p["tags"]["type"] == kind_of_row]
            group = done.report["sets"]["held"]["groups"]["type"][kind_of_row]["scores"][which]["exact_match"]
            assert (group["value"], group["n"]) == (pytest.approx(sum(chosen) / len(chosen)), len(chosen))
    assert done.report["sets"]["held"]["scores"] == done.report["scores"]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_the_tiny_model_learns_and_the_merged_model_says_what_the_adapter_says(kind: str) -> None:
    done = finished(kind)
    answers = [p["answers"] for p in done.predictions()]
    assert [a["merged"] for a in answers] == [a["adapter"] for a in answers]
    assert done.report["scores"]["base"]["exact_match"]["value"] == 0.0
    assert done.report["scores"]["adapter"]["exact_match"]["value"] == 1.0
    proof = done.report["merge"]["proof"]
    assert proof["onto"] == ("dequantized" if kind == "nf4" else "base")
    assert proof["outputs"]["checked"] and proof["outputs"]["argmax_beyond_rounding"] == 1.0
    assert (proof["outputs_other_base"] is None) == (kind == "plain")


def test_the_facts_of_training_are_counted_right() -> None:
    done = finished("plain")
    facts = json.loads((done.run / "training.json").read_text())
    adapter = load_file(done.run / "adapter" / "adapter_model.safetensors")
    assert facts == done.report["training"]
    assert facts["trainable"] == sum(tensor.numel() for tensor in adapter.values())
    assert (facts["steps"], facts["rows"], facts["rows_per_step"], facts["samples"]) == (160, 16, 4, 640)
    assert facts["epochs"] == 640 / 16
    assert facts["stopped"] is None
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_merged_folder_is_base_plus_adapter_and_nothing_else() -> None:
    done = finished("plain")
    before, after = load_file(model() / "model.safetensors"), load_file(done.run / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    merge = done.report["merge"]
    assert len(changed) == merge["tensors"] - merge["untouched"] == 17
    assert {name.partition(".")[0] for name in changed} == {"language_model", "multi_modal_projector"}


def test_plain_transformers_and_peft_give_the_same_answers() -> None:
    done = finished("plain")
    result = run_process(sys.executable, "-c", PLAIN, done.run, model(), "float32")
    assert result.code == 0, result.err
    found = json.loads(result.out.splitlines()[-1])
    assert found["foreign"] == []
    for which in ("base", "adapter", "merged"):
        assert found[which] == [p["answers"][which] for p in done.predictions()], which


def test_method_full_leaves_an_ordinary_model_folder_in_the_export_type() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    done = finished("full")
    assert set(done.report["scores"]) == {"base", "adapter"}
    assert {value.dtype for value in load_file(done.run / "model" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = AutoModelForImageTextToText.from_pretrained(done.run / "model")
    assert loaded.dtype == torch.bfloat16
    weights = dict(loaded.named_parameters())
    trained = load_file(done.run / "checkpoints" / "step-000008" / "trainable.safetensors")
    base = dict(AutoModelForImageTextToText.from_pretrained(model()).named_parameters())
    assert all(torch.equal(weights[name], value.to(torch.bfloat16)) for name, value in trained.items())
    assert any(not torch.equal(base[name], value) for name, value in trained.items())
    frozen = weights.keys() - trained.keys()
    assert frozen and all(torch.equal(weights[name], base[name].to(torch.bfloat16)) for name in frozen)
    assert AutoProcessor.from_pretrained(done.run / "model").chat_template


def test_a_second_run_touches_nothing_resume_gives_the_report_overwrite_starts_afresh(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"train.max_steps": 4, "evaluate.models": ["adapter"], "export.merge": False})
    run = tmp_path / "runs" / "tiny"
    first = mmft.train(recipe, quiet=True)
    before, sha = hashes(run), adapter_sha(run)
    again = cli("train", recipe)
    assert again.code == 4
    assert "--resume" in again.err and "--overwrite" in again.err and again.out == ""
    assert hashes(run) == before

    resumed = cli("train", recipe, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json() == first
    kept = ("adapter", "checkpoints", "predictions.jsonl", "report", "training.json", "metrics.jsonl")
    after = hashes(run)
    assert {n: s for n, s in after.items() if n.startswith(kept)} == {
        n: s for n, s in before.items() if n.startswith(kept)
    }

    other = cli("train", recipe, "train.learning_rate=2e-2", "--resume")
    assert other.code == 2 and "train.learning_rate" in other.err
    assert adapter_sha(run) == sha

    (run / "stray.txt").write_text("old")
    fresh = cli("train", recipe, "train.seed=1", "--overwrite", "--json")
    assert fresh.code == 0, fresh.err
    assert not (run / "stray.txt").exists()
    assert [event["kind"] for event in read_lines(run / "events.jsonl")].count("open") == 1
    assert adapter_sha(run) != sha
    assert cli("train", recipe, "--overwrite").code == 0
    assert adapter_sha(run) == sha


def test_evaluate_again_changes_no_answer_and_keeps_the_proof(tmp_path: Path) -> None:
    done = finished("plain")
    before = done.report
    again = cli("evaluate", done.run, "--json")
    assert again.code == 0, again.err
    assert {k: again.json()[k] for k in ("scores", "sets", "merge")} == {
        k: before[k] for k in ("scores", "sets", "merge")
    }


# ---------------------------------------------------------------- kills and signals


def _trajectory(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step in the order of the file."""
    return [(row["step"], row["loss"]) for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def _same_as_whole(run: Path) -> None:
    whole = trained_only().run
    assert adapter_sha(run) == adapter_sha(whole)
    assert _trajectory(run) == _trajectory(whole)
    last = "checkpoints/step-000060"
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert (run / last / name).read_bytes() == (whole / last / name).read_bytes()


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    recipe, run, draw = write_recipe(tmp_path, LONG), tmp_path / "runs" / "tiny", random.Random(7)
    for number, target in enumerate(sorted(draw.sample(range(2, 25), 3))):
        resume = ["--resume"] if number else []
        pid = stable().start("train", recipe, "--quiet", *resume, log=tmp_path / "log")
        wait_for_step(run, target)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert stable().wait(pid) == -signal.SIGKILL
        assert not (run / "adapter").exists()
    report = mmft.train(recipe, resume=True, quiet=True)
    assert report["training"]["steps"] == 60
    _same_as_whole(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_end_with_a_checkpoint_and_their_own_status(workers: int, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, {**LONG, "train.dataloader_num_workers": workers}), tmp_path / "runs" / "tiny"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGINT, 12)):
        words = ["train", recipe, *(["--resume"] if number == signal.SIGINT else [])]
        pid = stable().start(*words, log=tmp_path / "log")
        wait_for_step(run, step)
        os.kill(pid, number)
        assert stable().wait(pid) == 128 + number, (tmp_path / "log").read_text()
        stopped = _trajectory(run)[-1][0]
        newest = max((run / "checkpoints").iterdir())
        assert newest.name == f"step-{stopped:06d}" and (newest / "MANIFEST.json").is_file()
        assert json.loads((run / "training.json").read_text())["stopped"] == f"signal {int(number)}"
        text = (tmp_path / "log").read_text()
        assert "Traceback" not in text and f"stopped by signal {int(number)} after step {stopped}" in text
        assert not (run / "adapter").exists() and not (run / ".lock").exists()
    mmft.train(recipe, resume=True, quiet=True)
    assert json.loads((run / "training.json").read_text())["stopped"] is None
    _same_as_whole(run)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, LONG), tmp_path / "runs" / "tiny"
    pid = stable().start("train", recipe, log=tmp_path / "log")
    wait_for_step(run, 14)
    os.kill(pid, signal.SIGKILL)
    stable().wait(pid)
    newest = max((run / "checkpoints").iterdir()) / "trainable.safetensors"
    data = newest.read_bytes()
    newest.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    resumed = cli("train", recipe, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert f"{newest.parent.name} is damaged and passed over" in resumed.err
    _same_as_whole(run)


def _opened(run: Path) -> int:
    return [event["kind"] for event in read_lines(run / "events.jsonl")].count("open")


@pytest.mark.slow
def test_ten_kills_of_a_whole_run_change_nothing(tmp_path: Path) -> None:
    """Kills of the console script at any time from its opening of the run on, merge and evaluation included."""
    recipe = write_recipe(tmp_path, {"train.max_steps": 160, "train.save_steps": 8, "train.learning_rate": 5e-3})
    run, draw, landed = tmp_path / "runs" / "tiny", random.Random(11), 0
    for number in range(10):
        words = [str(BIN / "mmft"), "train", str(recipe), "--resume", "--quiet"]
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment())
        while process.poll() is None and _opened(run) <= number:
            time.sleep(0.01)
        try:
            process.wait(timeout=draw.uniform(0, 1.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            landed += 1
    assert landed >= 5, (tmp_path / "log").read_text()
    report = mmft.train(recipe, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(finished("plain").run)
    assert report["scores"] == finished("plain").report["scores"]
    assert hashes(run / "merged")["model.safetensors"] == hashes(finished("plain").run / "merged")["model.safetensors"]
    assert not [path for path in run.rglob("*.tmp")]


def test_a_run_that_was_killed_before_it_wrote_its_recipe_is_started_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {**TRAIN_ONLY, "train.max_steps": 1})
    place = tmp_path / "runs" / "tiny"
    place.mkdir(parents=True)
    (place / ".recipe.yaml.999999999-1.tmp").write_text("na")
    (place / ".lock").write_text(json.dumps({"pid": 999999999, "host": socket.gethostname()}))
    assert mmft.train(recipe, resume=True, quiet=True)["training"]["steps"] == 1
    assert not list(place.glob(".recipe*"))
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "mine.txt").write_text("stays")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        mmft.train(recipe, ["name=other"], quiet=True)


def test_a_run_that_failed_on_its_data_is_simply_started_again(tmp_path: Path) -> None:
    path = tiny_rows(tmp_path / "mine", 4)
    picture = next(iter(sorted((tmp_path / "mine").rglob("*.png"))))
    picture.rename(picture.with_suffix(".away"))
    recipe = write_recipe(tmp_path, {**TRAIN_ONLY, "data.train": str(path), "train.max_steps": 1})
    with pytest.raises(DataError):
        mmft.train(recipe, quiet=True)
    picture.with_suffix(".away").rename(picture)
    assert mmft.train(recipe, quiet=True)["training"]["steps"] == 1
    with pytest.raises(CheckpointError, match="already holds a run"):
        mmft.train(recipe, quiet=True)
