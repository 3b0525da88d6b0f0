"""Whole runs with packed rows: killed and resumed, on two processes, against --plain, shown by plan, trace, preview."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mmft
from tests.runs import (
    TRAIN_ONLY,
    adapter_sha,
    answer_of,
    cli,
    read_lines,
    rewrite,
    run_process,
    stable,
    values,
    wait_for_step,
    workshop,
    write_recipe,
)
from tests.tiny import tiny_rows

ASKED = ("Which colour?", "What colour has it, in one word?", "Tell me the colour of this picture, please.")
QUIET = {**TRAIN_ONLY, "adapter.lora_dropout": 0.0, "train.effective_batch_size": 12}
GROUPED = {**QUIET, "train.train_sampling_strategy": "group_by_media"}


def questions() -> Path:
    """Eight pictures, three questions of unlike lengths about each."""
    folder = workshop() / "questions"
    if folder.exists():
        return folder / "all.jsonl"
    lines = []
    for number, asked in enumerate(ASKED):
        path = tiny_rows(folder, 8)

        def ask(row, asked=asked, number=number):
            question = [{"type": "image"}, {"type": "text", "text": asked}]
            answer = {"role": "assistant", "content": answer_of(row)}
            return {**row, "id": f"{row['id']}-{number}", "messages": [{"role": "user", "content": question}, answer]}

        lines.append(rewrite(path, ask).read_text())
    (folder / "all.jsonl").write_text("".join(lines))
    return folder / "all.jsonl"


def recipe(folder: Path, changes: dict[str, object]) -> Path:
    return write_recipe(folder, {"data.train": [{"path": str(questions())}], **changes})


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def near(one: Path, two: Path) -> None:
    """Losses within 1e-5 of each other, weights within 1e-4 after 8 steps of Adam at 1e-2."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4


@pytest.fixture(scope="module")
def grouped() -> Path:
    """The run with rows grouped by picture, packed and shared."""
    folder = workshop() / "grouped"
    mmft.train(recipe(folder, GROUPED), quiet=True)
    return folder / "runs" / "tiny"


def test_a_run_is_the_plain_run(tmp_path, grouped):
    assert cli("train", recipe(tmp_path, GROUPED), "--plain", "--quiet").code == 0
    plain = tmp_path / "runs" / "tiny"
    near(plain, grouped)
    ours, theirs = (json.loads((run / "training.json").read_text()) for run in (grouped, plain))
    assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"])


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, grouped):
    path, run = recipe(tmp_path, GROUPED), tmp_path / "runs" / "tiny"
    pid = stable().start("train", path, "--quiet", log=tmp_path / "log")
    wait_for_step(run, 3)
    os.kill(pid, signal.SIGKILL)
    assert stable().wait(pid) == -signal.SIGKILL
    mmft.train(path, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(grouped) and losses(run) == losses(grouped)


def test_workers_change_nothing(tmp_path, grouped):
    mmft.train(recipe(tmp_path, {**GROUPED, "train.dataloader_num_workers": 2}), quiet=True)
    assert adapter_sha(tmp_path / "runs" / "tiny") == adapter_sha(grouped)


def test_two_processes_compute_what_one_does(tmp_path, grouped):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launch, "-m", "mmft", "train", recipe(tmp_path, GROUPED), "--quiet"]
    outcome = run_process(*words, ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err[-3000:]
    near(grouped, tmp_path / "runs" / "tiny")


def test_a_run_is_not_resumed_across_the_switch(tmp_path):
    path, run = recipe(tmp_path, QUIET), tmp_path / "runs" / "tiny"
    pid = stable().start("train", path, "--quiet", log=tmp_path / "log")
    wait_for_step(run, 4)
    os.kill(pid, signal.SIGKILL)
    stable().wait(pid)
    outcome = cli("train", path, "train.packing=false", "--resume")
    assert outcome.code and "fast: " in outcome.err and "packing" in outcome.err


def test_what_was_asked_for_is_refused_with_the_reason(tmp_path):
    outcome = cli("train", recipe(tmp_path, {**TRAIN_ONLY, "train.packing": True}))
    assert outcome.code and "rows cannot be packed: adapter.lora_dropout" in outcome.err


@pytest.mark.parametrize("word", ["packing", "neat_packing", "padding_free", "sample_packing"])
def test_other_tools_words(tmp_path, word):
    from mmft.recipe.load import load_recipe

    given = values(tmp_path, {f"train.{word}": True})
    assert load_recipe(given).train.packing is True
    assert load_recipe(values(tmp_path)).train.packing == "auto"


def test_the_plan_shows_what_is_saved(tmp_path):
    out = cli("plan", recipe(tmp_path, GROUPED)).out
    line = next(line for line in out.splitlines() if line.split()[:2] == ["packing", "on"])
    assert "padding" in line and "-> 0% of the tokens" in line
    line = next(line for line in out.splitlines() if line.split()[:2] == ["shared_prefix", "on"])
    assert "24 of 24 rows" in line and "67% of the pictures" in line


def test_trace_and_preview_show_the_pack(tmp_path):
    path = recipe(tmp_path, GROUPED)
    out = cli("trace", path).out
    line = next(line for line in out.splitlines() if "6 pack" in line)
    assert "12 rows in 4 forwards; this one 3 rows" in line and "of 157" in line, out
    assert cli("preview", path, "--out", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "step 0" in page and "computed once" in page
