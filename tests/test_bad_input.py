"""Every mistake a user can make ends with its own exit code, the house form and nothing written or lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.runs import (
    TRAIN_ONLY,
    Outcome,
    adapter_sha,
    cli,
    finished,
    hashes,
    model,
    rewrite,
    rows,
    stable,
    write_recipe,
)

SHORT = {"train.max_steps": 1, "train.effective_batch_size": 16, "train.per_device_train_batch_size": 16, **TRAIN_ONLY}


def _refused(outcome: Outcome, code: int, what: str, *, allowed: str | None = None, at: str | None = None) -> None:
    """The house form: `Kind: what`, then `at`, `allowed`, `do`."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert re.search(r"^\w+Error: ", outcome.err, re.M), outcome.err
    assert what in outcome.err, outcome.err
    assert re.search(r"^  do      \S", outcome.err, re.M), outcome.err
    assert re.search(rf"^  at      .*{re.escape(at or '')}", outcome.err, re.M), outcome.err
    if allowed is not None:
        assert re.search(rf"^  allowed .*{re.escape(allowed)}", outcome.err, re.M), outcome.err


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "what", "allowed"),
    [
        ({"train.learning_rat": 1e-3}, "learning_rat", "learning_rate"),
        ({"trian": {}}, "trian", "train"),
        ({"train.max_steps": "many"}, "max_steps", None),
        ({"train.learning_rate": -1.0}, "learning_rate", None),
        ({"train.lr_scheduler_type": "cosinus"}, "cosinus", "cosine"),
        ({"adapter.targets": ["q_proj"]}, "q_proj", "language.attention"),
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "both true", None),
        ({"export.merge_onto": "dequantized"}, "the base is not quantized", None),
        ({"train.effective_batch_size": 5}, "not a multiple", None),
        ({"train.early_stopping_patience": 2}, "eval_steps is 0", None),
        ({"data.train": [{"path": "nowhere.jsonl"}]}, "nowhere.jsonl", None),
        ({"model.name_or_path": "/no/such/model"}, "does not exist", "shipped:NAME"),
        ({"name": "../out"}, "cannot be a folder's name", "letters"),
    ],
    ids=str,
)
def test_a_wrong_recipe_is_refused_by_line_before_anything_is_made(
    changes: dict[str, Any], what: str, allowed: str | None, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, changes)
    for verb in ("validate", "train"):
        _refused(cli(verb, recipe), 2, what, allowed=allowed, at="recipe.yaml:")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"train.learning_rat": 1, "train.max_steps": 0, "adapter.targets": ["q_proj"]})
    outcome = cli("validate", recipe)
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("learning_rat", "max_steps", "q_proj"))
    assert len(re.findall(r"^RecipeError: ", outcome.err, re.M)) == 3


def test_an_override_and_a_file_that_are_wrong(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    _refused(cli("validate", recipe, "train.max_stepz=3"), 2, "max_stepz", at="command line")
    _refused(cli("validate", tmp_path / "recipi.yaml"), 2, "recipi.yaml")


def test_debug_gives_the_traceback(tmp_path: Path) -> None:
    from mmft.errors import RecipeError

    recipe = write_recipe(tmp_path, {"train.learning_rat": 1})
    with pytest.raises(RecipeError, match="learning_rat"):
        cli("validate", recipe, "--debug")
    child = stable().run("validate", recipe, "--debug", log=tmp_path / "log")
    assert child.code == 1 and "Traceback (most recent call last)" in child.err


# ---------------------------------------------------------------- data


def _with_rows(tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], **more: Any) -> Path:
    """A recipe on a copy of the 16 rows in which `change` has been at row 5."""
    folder = tmp_path / "data"
    shutil.copytree(rows().parent, folder)
    rewrite(folder / "rows.jsonl", lambda row: change(row) if row["id"] == "row-5" else row)
    return write_recipe(tmp_path, {**SHORT, "data.train": [{"path": str(folder / "rows.jsonl")}], **more})


def _ended(recipe: Path, before: dict[str, str]) -> None:
    """Nothing that looks like a result was left, the data are as they were."""
    run = recipe.parent / "runs" / "tiny"
    assert not [name for name in ("adapter", "merged", "report.json", ".lock") if (run / name).exists()]
    assert hashes(recipe.parent / "data") == before


def _picture(folder: Path, change: Callable[[Path], None]) -> None:
    change(next(folder.glob("*-5.png")))


def _say(row: dict[str, Any], text: str) -> dict[str, Any]:
    return {**row, "messages": [row["messages"][0], {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda row: {**row, "images": ["gone.png"]}, "does not exist"),
        (lambda row: {**row, "images": ["/etc/passwd"]}, "leads outside"),
        (lambda row: {**row, "images": ["http://host/a.png"]}, "is a URL"),
        (lambda row: {**row, "images": row["images"] * 2}, "1 image placeholder(s) but 2 image(s)"),
        (lambda row: {**row, "images": []}, "1 image placeholder(s) but 0 image(s)"),
        (lambda row: _say(row, ""), "an answer is empty"),
        (lambda row: {**row, "messages": row["messages"][:1]}, "the last turn is not the assistant's"),
        (lambda row: {**row, "id": "row-4"}, "was given before"),
    ],
    ids=["missing", "outside", "url", "too-many", "too-few", "empty-answer", "no-answer", "same-id"],
)
def test_a_bad_row_is_named_by_its_line(
    change: Callable[[dict[str, Any]], dict[str, Any]], what: str, tmp_path: Path
) -> None:
    recipe = _with_rows(tmp_path, change)
    before = hashes(tmp_path / "data")
    outcome = cli("plan", recipe)
    assert outcome.code == 3 and "Traceback" not in outcome.err
    assert "1 of 16 rows of 'rows' are bad" in outcome.err and what in outcome.err
    assert re.search(r"^  at      .*rows\.jsonl:6$", outcome.err, re.M), outcome.err
    assert re.search(r"^  do      ", outcome.err, re.M)
    assert cli("train", recipe).code == 3
    _ended(recipe, before)


def test_bad_rows_are_left_out_where_the_recipe_allows_it(tmp_path: Path) -> None:
    recipe = _with_rows(tmp_path, lambda row: {**row, "images": ["gone.png"]}, **{"data.max_bad_fraction": 0.1})
    assert cli("plan", recipe, "--json").json()["data"]["train"] == 15


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_left_out_before_the_first_step(workers: int, tmp_path: Path) -> None:
    allowed = {"data.max_bad_fraction": 0.1, "train.dataloader_num_workers": workers}
    recipe = _with_rows(tmp_path, lambda row: row, **allowed)
    _picture(tmp_path / "data", _corrupt)
    outcome = cli("train", recipe, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["training"]["rows"] == 15
    assert "1 of 16 rows are bad and left out" in " ".join(outcome.err.split())
    _picture(tmp_path / "data", lambda path: path.with_name(path.name.replace("-5", "-6")).write_bytes(b""))
    _refused(cli("train", recipe, "--overwrite", "--quiet"), 3, "2 of 16 rows of 'rows' are bad", at="rows.jsonl:6")


def _corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = b""
    path.write_bytes(bytes(data))


def _oversized(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path)  # 81 million pixels in 10 kB


@pytest.mark.parametrize(
    ("change", "what", "allowed"),
    [
        (_corrupt, "the picture cannot be decoded", None),
        (_oversized, "9000 x 9000 = 81000000 pixels", "at most 40000000 pixels"),
        (lambda path: path.write_text("<svg/>"), "not a picture that is read here", "PNG, JPEG"),
    ],
    ids=["corrupt", "oversized", "no-picture"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_stops_the_run_and_is_named(
    change: Callable[[Path], None], what: str, allowed: str | None, workers: int, tmp_path: Path
) -> None:
    recipe = _with_rows(tmp_path, lambda row: row, **{"train.dataloader_num_workers": workers})
    _picture(tmp_path / "data", change)
    before = hashes(tmp_path / "data")
    _refused(cli("train", recipe, "--quiet"), 3, what, allowed=allowed, at="0-5.png")
    _ended(recipe, before)


def _long(row: dict[str, Any]) -> dict[str, Any]:
    return _say(row, "green " * 60)


def _long_question(row: dict[str, Any]) -> dict[str, Any]:
    question = [{"type": "image"}, {"type": "text", "text": "Which colour? " * 30}]
    return {**row, "messages": [{"role": "user", "content": question}, row["messages"][1]]}


def test_an_answer_is_never_cut(tmp_path: Path) -> None:
    recipe = _with_rows(tmp_path, _long, **{"data.max_length": 128, "data.over_length": "truncate_text"})
    _refused(cli("train", recipe, "--quiet"), 3, "the row has 393 tokens", at="rows.jsonl:6")


def test_an_over_long_row_is_an_error_by_default(tmp_path: Path) -> None:
    recipe = _with_rows(tmp_path, _long, **{"data.max_length": 128})
    before = hashes(tmp_path / "data")
    _refused(cli("train", recipe, "--quiet"), 3, "128", at="rows.jsonl:6")
    _ended(recipe, before)


@pytest.mark.parametrize(("how", "kept"), [("drop", 15), ("truncate_text", 16)])
def test_an_over_long_row_is_dropped_or_cut_where_the_recipe_says_so(how: str, kept: int, tmp_path: Path) -> None:
    recipe = _with_rows(tmp_path, _long_question, **{"data.max_length": 128, "data.over_length": how})
    outcome = cli("train", recipe, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["training"]["rows"] == kept
    if how == "drop":
        assert "dropped 1 of 16 rows longer than 128 tokens" in outcome.err
        assert cli("plan", recipe, "--json").json()["data"]["train"] == 15


@pytest.mark.parametrize("how", ["error", "drop", "truncate_text"])
def test_rows_that_are_all_too_long_are_an_error(how: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {**SHORT, "data.max_length": 18, "data.over_length": how})
    _refused(cli("train", recipe, "--quiet"), 3, "18")
    outcome = cli("plan", recipe)
    assert outcome.code == 3 and "Traceback" not in outcome.err


# ---------------------------------------------------------------- models and adapters


def test_an_adapter_of_another_base_is_refused() -> None:
    adapter, other = finished().run / "adapter", model("llava", 1)
    before = hashes(finished().run)
    outcome = cli("generate", adapter, "--base", other, "--question", "Which colour?")
    _refused(outcome, 8, "was trained on another base", allowed=f"base {model()}", at=str(adapter))
    assert "model.safetensors" in outcome.err
    assert hashes(finished().run) == before


def test_merging_onto_another_base_is_refused(tmp_path: Path) -> None:
    outcome = cli("merge", finished().run / "adapter", "--base", model("llava", 1), "--out", tmp_path / "merged")
    _refused(outcome, 8, "was trained on another base", allowed=f"base {model()}")
    assert not (tmp_path / "merged").exists()


def test_a_hub_id_without_the_hub(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"model.name_or_path": "someone/never-downloaded"})
    for words in (["plan", recipe], ["train", recipe], ["inspect", "someone/never-downloaded"]):
        _refused(cli(*words), 7, "the hub cannot be reached", allowed="a local folder", at="someone/never-downloaded")


def test_a_text_only_model_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "text"
    )
    recipe = write_recipe(tmp_path, {"model.name_or_path": str(tmp_path / "text")})
    for words in (["plan", recipe], ["train", recipe], ["inspect", tmp_path / "text"]):
        _refused(cli(*words), 7, "is a llama model, not a vision-language model", allowed="llava", at="text")


def test_a_part_that_the_model_does_not_have(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {**SHORT, "adapter.targets": ["cross_attention"]})
    _refused(cli("train", recipe, "--quiet"), 8, "cross_attention", allowed="language")


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--question", " "], 2, "the question is empty"),
        (["--question", "?", "--image", "gone.png"], 3, "there is no image"),
        (["--question", "?", "--which", "merged"], 2, "needs a run folder"),
    ],
)
def test_generate_refuses(words: list[str], code: int, what: str) -> None:
    _refused(cli("generate", model(), *words), code, what)


def test_a_run_without_a_merged_model_says_which_it_has() -> None:
    outcome = cli("generate", finished("full").run, "--question", "?", "--which", "merged")
    _refused(outcome, 2, "the run has no merged model", allowed="base, adapter")


def test_verbs_on_what_is_no_run(tmp_path: Path) -> None:
    for verb in ("evaluate", "report"):
        outcome = cli(verb, tmp_path)
        assert outcome.code == 4 and "Traceback" not in outcome.err, outcome.err
    assert cli("generate", tmp_path, "--question", "?").code == 7
    assert cli("merge", tmp_path, "--out", tmp_path / "x").code == 8
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- disk and folders


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SHORT)
    thesis = tmp_path / "runs" / "tiny" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    for how in ([], ["--resume"], ["--overwrite"]):
        _refused(cli("train", recipe, *how), 4, "is not a run folder", at="output_dir")
        assert hashes(tmp_path / "runs") == {"tiny/thesis.txt": hashes(thesis.parent)["thesis.txt"]}


def test_a_run_that_is_going_on_is_not_joined(tmp_path: Path) -> None:
    from mmft.files import run_lock

    recipe, run = write_recipe(tmp_path, SHORT), tmp_path / "runs" / "tiny"
    with run_lock(run):
        (run / "recipe.yaml").write_text(recipe.read_text())
        before = hashes(run)
        for how in ("--resume", "--overwrite"):
            _refused(cli("train", recipe, how), 4, "another run is using this folder", at=".lock")
        assert hashes(run) == before


def test_a_disk_that_is_full_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmft.files

    recipe = write_recipe(tmp_path, SHORT)
    monkeypatch.setattr(mmft.files, "free_bytes", lambda path: 1000)
    _refused(cli("train", recipe, "--quiet"), 4, "1,000 bytes free", at="checkpoints")
    run = tmp_path / "runs" / "tiny"
    assert not list((run / "checkpoints").glob("*")) and not (run / "adapter").exists()


def test_a_file_that_cannot_be_written_whole(tmp_path: Path) -> None:
    """A limit on file sizes, which the kernel enforces as it does a full disk: in the middle of a write."""
    changes = {**TRAIN_ONLY, "train.max_steps": 4}
    recipe, run = write_recipe(tmp_path, changes), tmp_path / "runs" / "tiny"
    size = (finished().run / "adapter" / "adapter_model.safetensors").stat().st_size
    stopped = stable().run("train", recipe, "--quiet", log=tmp_path / "log", file_limit=size // 2)
    _refused(Outcome(stopped.code, "", stopped.err), 4, "the disk is full")
    assert not [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert not (run / "adapter").exists() and not (run / ".lock").exists()
    assert cli("train", recipe, "--resume").code == 0
    assert json.loads((run / "training.json").read_text())["steps"] == 4


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmft.files

    changes = {**TRAIN_ONLY, "train.max_steps": 4}
    recipe, run = write_recipe(tmp_path, changes), tmp_path / "runs" / "tiny"
    free, step = mmft.files.free_bytes, run / "checkpoints" / "step-000002"
    with monkeypatch.context() as patch:
        patch.setattr(mmft.files, "free_bytes", lambda path: 1000 if step.exists() else free(path))
        assert cli("train", recipe, "--quiet").code == 4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    before = hashes(step)
    assert cli("train", recipe, "--resume").code == 0
    assert hashes(step) == before
    whole = tmp_path / "whole"
    assert cli("train", write_recipe(whole, changes), "--quiet").code == 0
    assert adapter_sha(run) == adapter_sha(whole / "runs" / "tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, SHORT)
    (tmp_path / "runs").mkdir(mode=0o500)
    _refused(cli("train", recipe, "--quiet"), 4, "cannot")
