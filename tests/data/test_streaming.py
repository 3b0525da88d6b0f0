"""Runs over streamed sets: batches for workers and ranks, bad rows, killed and resumed, larger than the cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import mmft
from mmft.data.collate import collate
from mmft.data.convert import write_samples
from mmft.data.formats import load_samples
from mmft.data.loader import batches
from mmft.data.order import StepPlan
from mmft.data.render import Renderer
from mmft.data.steps import plan_steps
from mmft.data.stream_order import StreamPlan
from mmft.data.streaming import Streamed, open_streams
from mmft.errors import DataError, RecipeError
from mmft.journal import Journal
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSection, DataSource
from mmft.stages import load_datasets
from tests.data.test_stream_files import written
from tests.runs import (
    TRAIN_ONLY,
    adapter_sha,
    cli,
    hashes,
    read_lines,
    rows,
    run_process,
    stable,
    values,
    wait_for_step,
    workshop,
    write_recipe,
)
from tests.tiny import tiny_processor, tiny_rows

QUIET = Journal(None, quiet=True)
FETCH = "import os, shutil\n\ndef bring(url, to):\n    shutil.copy({folder!r} + url.rpartition('/')[2], to)\n"


@pytest.fixture(scope="module", autouse=True)
def cache():
    """A cache of this module's own."""
    before = os.environ.get("MMFT_CACHE")
    os.environ["MMFT_CACHE"] = str(workshop() / "stream-cache")
    yield
    os.environ.pop("MMFT_CACHE") if before is None else os.environ.update(MMFT_CACHE=before)


def shards(count: int = 6, each: int = 5) -> Path:
    """A folder of `count` tar shards of `each` rows, `fetch.py` that brings one, and `list.json` that names them."""
    folder = workshop() / f"shards-{count}-{each}"
    if folder.exists():
        return folder
    samples = load_samples(DataSource(path=str(tiny_rows(workshop() / "stream-rows", count * each))), seed=0).samples
    folder.mkdir()
    for number in range(count):
        write_samples(samples[number * each : (number + 1) * each], folder / "x", to="webdataset")
        shutil.move(folder / "x" / "000000.tar", folder / f"{number}.tar")
        (folder / "x" / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "x")
    (folder / "fetch.py").write_text(FETCH.format(folder=f"{folder}/"))
    listed = [{"url": f"far://bucket/{number}.tar", "nsamples": each} for number in range(count)]
    (folder / "list.json").write_text(json.dumps({"shardlist": listed}))
    return folder


def recipe(folder: Path, changes: dict[str, object]) -> Path:
    """A stream of shards mixed with rows in memory, two of the stream to one of these."""
    mixed = [
        {"path": f"{shards()}/*.tar", "name": "far", "streaming": True, "weight": 2},
        {"path": str(rows(8, 1)), "name": "near", "weight": 1},
    ]
    return write_recipe(folder, {"data.train": mixed, **TRAIN_ONLY, "train.effective_batch_size": 4, **changes})


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def whole() -> Path:
    """The uninterrupted run."""
    mmft.train(recipe(workshop() / "stream-whole", {}), quiet=True)
    return workshop() / "stream-whole" / "runs" / "tiny"


def test_the_run_draws_both_sets_and_tells_their_losses(whole):
    facts = json.loads((whole / "training.json").read_text())
    assert facts["rows"] == 38 and facts["samples"] == 32
    told = read_lines(whole / "metrics.jsonl")
    terms = {name: sum(row.get(f"terms/{name}", 0) for row in told) for name in ("far", "near")}
    assert sum(terms.values()) == sum(row["supervised_tokens"] for row in told if "loss" in row)
    assert 1.5 < terms["far"] / terms["near"] < 2.7
    assert "Training loss by data set" in (whole / "report.html").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, whole, workers):
    path, run = recipe(tmp_path, {"train.dataloader_num_workers": workers}), tmp_path / "runs" / "tiny"
    pid = stable().start("train", path, "--quiet", log=tmp_path / "log")
    wait_for_step(run, 3)
    os.kill(pid, signal.SIGKILL)
    assert stable().wait(pid) == -signal.SIGKILL
    mmft.train(path, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(whole) and losses(run) == losses(whole)


def test_shards_larger_than_the_cache_are_fetched_and_give_the_same_run(tmp_path, monkeypatch):
    """The cache holds two of six shards of a pass; killed and resumed, with the bytes of the run that has them all."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "all"))
    one = [{"path": f"{shards()}/list.json", "name": "far", "streaming": True}]
    changes = {"data.train": one, "train.max_steps": 14, "train.effective_batch_size": 4}
    brought = f"{shards()}/fetch.py:bring"
    mmft.train(recipe(tmp_path / "all", changes), fetch=brought, quiet=True)
    size = max(path.stat().st_size for path in shards().glob("*.tar"))
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "small"))
    monkeypatch.setenv("MMFT_CACHE_SIZE", str(int(2.2 * size)))
    path, run = recipe(tmp_path / "few", changes | {"train.dataloader_num_workers": 1}), tmp_path / "few/runs/tiny"
    with pytest.raises(DataError, match="--fetch"):
        mmft.train(path, quiet=True)
    words = [sys.executable, "-m", "mmft", "train", path, "--quiet", "--fetch", brought]
    assert run_process(*words, "train.max_steps=14", "train.save_steps=2", "--overwrite").code == 0
    left = [one.stat().st_size for one in (tmp_path / "small" / "streams").rglob("*.tar")]
    assert 0 < sum(left) <= 2.2 * size and len(left) == 2
    assert adapter_sha(run) == adapter_sha(tmp_path / "all" / "runs" / "tiny")
    for folder in sorted((run / "checkpoints").iterdir())[-1:]:
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "small")
    mmft.train(path, resume=True, fetch=brought, quiet=True, overrides=["train.max_steps=14"])
    assert adapter_sha(run) == adapter_sha(tmp_path / "all" / "runs" / "tiny")


def test_evaluate_and_merge_of_a_run_bring_shards_that_are_no_longer_there(tmp_path, monkeypatch):
    """Shards without a count of their rows: the empty cache of another machine must be filled again."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "one"))
    listed = [{"url": f"far://bucket/{number}.tar"} for number in range(2)]
    (tmp_path / "list.json").write_text(json.dumps({"shardlist": listed}))
    train = [{"path": str(tmp_path / "list.json"), "name": "far", "streaming": True}]
    changes = {"data.train": train, "data.eval": [{"path": str(rows(2, 1)), "name": "held"}], "train.max_steps": 2}
    brought = f"{shards()}/fetch.py:bring"
    mmft.train(recipe(tmp_path, changes), fetch=brought, quiet=True)
    run = tmp_path / "runs" / "tiny"
    told = json.loads((run / "report.json").read_text())["sets"]
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "other"))
    for verb in ("evaluate", "merge"):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        refused = cli(verb, run)
        assert refused.code == DataError.exit_code and "--fetch FILE.py:NAME" in refused.err
        done = cli(verb, run, "--fetch", brought, "--json")
        assert done.code == 0, done.err
        assert len([*(tmp_path / "other" / "streams").rglob("*.tar")]) == 2
    assert (run / "merged" / "model.safetensors").is_file()
    assert json.loads((run / "report.json").read_text())["sets"] == told
    wrong = cli("merge", run / "adapter", "--out", tmp_path / "out", "--fetch", brought)
    assert wrong.code == RecipeError.exit_code and "an adapter folder has no rows" in wrong.err


def test_two_processes_compute_what_one_does(tmp_path, whole):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launch, "-m", "mmft", "train", recipe(tmp_path, {}), "--quiet"]
    outcome = run_process(*words, ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err[-3000:]
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(losses(whole), rel=1e-5)
    for ours, theirs in zip(
        *(read_lines(one / "metrics.jsonl") for one in (tmp_path / "runs/tiny", whole)), strict=True
    ):
        assert {k: v for k, v in ours.items() if k.startswith("terms/")} == {
            k: v for k, v in theirs.items() if k.startswith("terms/")
        }


def test_a_changed_shard_is_refused_on_resume(tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(shards(), folder)
    changes = {"data.train": [{"path": str(folder / "*.tar"), "streaming": True}], "train.max_steps": 4}
    path = recipe(tmp_path, changes)
    mmft.train(path, quiet=True)
    shutil.copy(folder / "1.tar", folder / "2.tar")
    (tmp_path / "runs/tiny/report.json").unlink()
    outcome = cli("train", path, "--resume")
    assert outcome.code == 4 and "data: " in outcome.err


# ---------------------------------------------------------------- bad rows are met by their step


def spoilt(folder: Path, bad: dict[int, str], count: int = 40) -> Path:
    """Lines of which some are `bad`, in two files."""
    lines = tiny_rows(folder, count).read_text().splitlines()
    lines = [bad.get(at, line) for at, line in enumerate(lines)]
    for number in range(2):
        (folder / f"{number}.jsonl").write_text(
            "\n".join(lines[number * count // 2 : (number + 1) * count // 2]) + "\n"
        )
    (folder / "rows.jsonl").unlink()
    return folder


def stream_of(folder: Path, **data) -> tuple[Streamed, Renderer]:
    loaded = load_recipe(values(folder, {"data.train": [{"path": str(folder), "streaming": True}], "data.eval": []}))
    section = loaded.data.model_copy(update=data)
    renderer = Renderer(tiny_processor("llava"), max_length=section.max_length, over_length=section.over_length)
    return open_streams(section, [], wanted=("messages",), journal=QUIET), renderer


def seen(stream: Streamed, renderer: Renderer, plan: StepPlan, *, rank: int = 0, workers: int = 0, start: int = 0):
    """(ids, rows left out) of every forward of an epoch."""
    stop = plan.steps_for(1)
    found = batches(
        stream, renderer, plan, start_step=start, stop_step=stop, rank=rank, workers=workers, pad_token_id=0
    )
    return [[(one.ids, one.left_out, one.supervised) for one in step] for step in found]


def test_bad_rows_stop_the_run_or_are_left_out_the_same_everywhere(tmp_path):
    answer = {"role": "assistant", "content": "x"}
    asked = {"role": "user", "content": [{"type": "image"}]}
    gone = json.dumps({"messages": [asked, answer], "images": ["gone.png"]})
    long = json.dumps({"messages": [{"role": "user", "content": "w " * 900}, answer]})
    folder = spoilt(tmp_path / "d", {3: "{broken", 17: gone, 25: long, 31: "[]"})
    stream, renderer = stream_of(folder)
    plan = StreamPlan(len(stream), 2, 2, 1, 0, sets=stream.sets, draws=stream.draws)
    with pytest.raises(DataError, match=r"broken JSON|does not exist|tokens|list"):
        seen(stream, renderer, plan)
    stream, renderer = stream_of(folder, max_bad_fraction=0.1, over_length="drop", max_length=200)
    whole = seen(stream, renderer, plan)
    left = [told for step in whole for _, rows, _ in step for told in rows]
    assert sorted((text.partition(": ")[0].rpartition("/")[2].split(" ")[0], bad) for text, bad in left) == [
        ("0.jsonl:18", True), ("0.jsonl:4", True), ("1.jsonl:12", True), ("1.jsonl:6", False)
    ]  # fmt: skip
    ids = [name for step in whole for names, _, _ in step for name in names]
    assert len(ids) == 36 and len(set(ids)) == 36
    assert seen(stream, renderer, plan, workers=2) == whole and seen(stream, renderer, plan, start=4) == whole[4:]
    halves = [StreamPlan(len(stream), 2, 2, 2, 0, sets=stream.sets, draws=stream.draws) for _ in range(2)]
    ranks = [seen(stream, renderer, one, rank=rank) for rank, one in enumerate(halves)]
    assert [[*one, *two] for one, two in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("form", ["jsonl", "webdataset", "parquet"])
def test_every_kind_of_file_gives_the_rows_of_the_plain_reader(tmp_path, form):
    """Their pixels too, for this process and for two workers, which read the same opened files."""
    paths = written(tmp_path, form)
    place = paths[0] if len(paths) == 1 else tmp_path / "*.tar"
    section = DataSection(train=(DataSource(path=str(place), streaming=True, name="x"),))
    stream = open_streams(section, [], wanted=("messages",), journal=QUIET)
    plain = [one for path in paths for one in load_samples(DataSource(path=str(path), name="x"), seed=0).samples]
    assert stream.near(3)[0].id == plain[0].id  # the parent has read from the files before the workers do
    renderer = Renderer(tiny_processor("llava"), max_length=512)
    plan = StreamPlan(20, 4, 1, 1, 0, sets=stream.sets, draws=stream.draws)
    for workers in (0, 2):
        how = {"start_step": 0, "stop_step": 5, "rank": 0, "workers": workers, "pad_token_id": 0}
        for step, (micro,) in enumerate(batches(stream, renderer, plan, **how)):
            rows = [plain[row] for row, _ in plan.step_rows(step)]
            wanted = collate([renderer.render(row) for row in rows], pad_token_id=0)
            assert micro.ids == wanted.ids and micro.counted == wanted.counted
            assert all(torch.equal(micro.inputs[name], wanted.inputs[name]) for name in wanted.inputs)


def test_a_forward_of_bad_rows_alone_learns_nothing(tmp_path):
    folder = spoilt(tmp_path / "d", {at: "{" for at in range(0, 40, 2)})
    stream, renderer = stream_of(folder, max_bad_fraction=0.6)
    plan = StreamPlan(len(stream), 1, 4, 1, 0, sets=stream.sets, draws=stream.draws)
    found = [one for step in seen(stream, renderer, plan) for one in step]
    assert len(found) == 40 and sum(not ids for ids, _, _ in found) == 20
    assert all((supervised == 0) == (not ids) == bool(left) for ids, left, supervised in found)
    changes = {"data.train": [{"path": str(folder), "streaming": True}], **TRAIN_ONLY, "train.max_steps": 10}
    changes |= {"train.per_device_train_batch_size": 1, "data.max_bad_fraction": 0.6}
    mmft.train(write_recipe(tmp_path, changes), quiet=True)
    events = read_lines(tmp_path / "runs/tiny/events.jsonl")
    told = [row for one in events if one.get("event", one.get("kind")) == "bad_rows" for row in one["rows"]]
    assert len(told) == 20 and all("broken JSON" in row for row in told)
    changes |= {"data.max_bad_fraction": 0.2, "train.output_dir": str(tmp_path / "no")}
    refused = cli("train", write_recipe(tmp_path / "no", changes))
    assert refused.code == 3 and re.search(r"(9|1[0-2]) bad rows were met", refused.err)


def test_recipes_that_cannot_stream_are_refused(tmp_path):
    far = {"path": f"{shards()}/*.tar", "streaming": True}
    for changes, message in (
        ({"data.train": [{**far, "num_samples": 3}]}, "true with num_samples"),
        ({"data.eval": [{**far, "name": "e"}]}, "evaluation sets are held in memory"),
        ({"data.train": [far], "train.train_sampling_strategy": "group_by_media"}, "brought together"),
        ({"data.train": [far], "train.packing": True}, "rows of a stream are not looked at"),
        ({"data.train": [{**far, "path": f"{shards()}/*.jsonl"}]}, "does not exist"),
    ):
        outcome = cli("train", write_recipe(tmp_path, {**TRAIN_ONLY, "adapter.lora_dropout": 0.0, **changes}))
        assert outcome.code in (2, 3) and message in outcome.err, (message, outcome.err)


def test_plan_trace_and_preview_read_a_stream(tmp_path):
    path = recipe(tmp_path, {})
    plan = cli("plan", path, "--json").json()
    assert plan["data"]["train"] == 38 and plan["steps"]["rows_per_step"] == 4
    assert any(row[0] == "packing" and "rows of a stream" in row[2] for row in plan["fast"])
    assert cli("trace", path, "--row", 3, "--json").code == 0
    assert cli("preview", path, "--rows", 2, "--out", tmp_path / "p.html").code == 0
    assert (tmp_path / "p.html").stat().st_size > 1000


def test_check_opens_the_files_of_a_stream(tmp_path):
    folder = spoilt(tmp_path / "d", {3: "{broken", 31: "[]"})
    listed = [{"url": "0.jsonl"}, {"url": "1.jsonl"}, {"url": "far://x/2.jsonl", "nsamples": 20}]
    (folder / "list.json").write_text(json.dumps({"shardlist": listed}))
    for name in ("list.json", "*.jsonl"):
        changes = {"data.train": [{"path": str(folder / name), "streaming": True}], "data.eval": []}
        found = mmft.check(write_recipe(tmp_path, changes), out=tmp_path / "bad.jsonl", workers=0, quiet=True)
        assert (found["rows"], found["bad"]) == (40, 2)
        places = [row["where"].rpartition("/")[2] for row in read_lines(tmp_path / "bad.jsonl")]
        assert places == ["0.jsonl:4", "1.jsonl:12"]
        assert any("1 of 3 files" in note for note in found["notes"]) == (name == "list.json")


def test_augmented_streams_change_by_epoch(tmp_path):
    loaded = load_recipe(recipe(tmp_path, {"data.augmentation": {"horizontal_flip": 0.5, "crop": 0.5}}))
    found = load_datasets(loaded, tiny_processor("llava"), QUIET).train
    assert isinstance(found, Streamed) and isinstance(plan_steps(loaded, found, 1)[0], StreamPlan)
    drawn = [found[3].at(epoch).media[0].drawn for epoch in (0, 1, 1)]
    assert drawn[0] != drawn[1] == drawn[2] is not None


def test_nothing_of_a_fetched_set_is_written_into_the_run(tmp_path, whole):
    assert not [name for name in hashes(whole) if name.endswith((".tar", ".places"))]
