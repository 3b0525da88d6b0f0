"""Streamed sets of every objective: rows of the plain reader, batches for workers and ranks, bad rows, whole runs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmft
from mmft.backbones.load import load_backbone
from mmft.data.loader import batches
from mmft.data.media import read_bytes
from mmft.data.order import StepPlan
from mmft.data.pairs import LEFT, RIGHT
from mmft.data.sample import Candidate, MediaRef
from mmft.data.stream_order import StreamPlan
from mmft.data.streaming import Streamed, open_streams
from mmft.data.tables import infer_columns
from mmft.errors import DataError, RecipeError
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.streams import opened_streams, rows_as_read
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSection, DataSource, Recipe
from tests import runs
from tests.fusion import test_run as fusion
from tests.fusion.test_run import home  # noqa: F401  (a fixture)
from tests.objectives import pairs
from tests.objectives.answers import preference_rows
from tests.objectives.joints import tiny_joint, tiny_masked
from tests.objectives.online.tries import changes
from tests.runs import adapter_sha, read_lines, run_process, stable, wait_for_step

QUIET = Journal(None, quiet=True)
NO_MERGE = {"data.eval": [], "export.merge": False}
PAIRS = ("contrastive", "joint", "dual", "mlm")
ANSWERS = ("dpo", "kto", "reward")
ALL = (*PAIRS, *ANSWERS, "grpo", "classification")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own."""
    before = os.environ.get("MMFT_CACHE")
    os.environ["MMFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("MMFT_CACHE") if before is None else os.environ.update(MMFT_CACHE=before)


def split(path: Path, to: Path, bad: dict[int, str] | None = None) -> Path:
    """The rows of a file in two files of `to`, with its media beside them; some of them `bad`."""
    lines = [(bad or {}).get(at, line) for at, line in enumerate(path.read_text().splitlines())]
    shutil.copytree(path.parent, to, dirs_exist_ok=True)
    for one in to.glob("*.jsonl"):
        one.unlink()
    half = len(lines) // 2
    for number, part in enumerate((lines[:half], lines[half:])):
        (to / f"{number}.jsonl").write_text("\n".join(part) + "\n")
    return to


def thumbs(row: dict[str, Any]) -> dict[str, Any]:
    """A pair as one thumb, good and bad by turns."""
    chosen, rejected = row.pop("chosen"), row.pop("rejected")
    good = len(chosen) % 2 == 0
    return {**row, "completion": chosen if good else rejected, "label": good}


def made(name: str, folder: Path, base: Path | None = None) -> tuple[dict[str, Any], Path]:
    """(recipe, its rows) of a tiny run of an objective without evaluation."""
    small = {**NO_MERGE, "train.max_steps": 6, "train.save_steps": 2}
    if name in PAIRS:
        model = {"joint": tiny_joint, "dual": tiny_joint, "mlm": lambda: tiny_masked("vilt")}.get(name, pairs.tiny_dual)
        batch = {"train.per_device_train_batch_size": 4, "train.effective_batch_size": 8}
        more = {"model.name_or_path": str(model()), "objective.name": name, "name": "tiny", **small, **batch}
        given = pairs.values(folder, more)
        given["adapter"]["targets"] = ["language.attention", *([] if name == "mlm" else ["vision.attention"])]
        return given, pairs.pair_rows()
    if name in ANSWERS:
        rows = preference_rows(folder / "rows", 16)
        if name == "kto":
            runs.rewrite(rows, thumbs)
        return runs.values(folder, {**small, "evaluate.group_by": [], "objective": {"name": name}}), rows
    if name == "grpo":
        return runs.values(folder, changes(name, **small)), runs.rows(16)
    assert base is not None
    given = fusion.recipe(
        base,
        folder / "runs",
        train={"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "effective_batch_size": 8},
    )
    given |= {
        "name": "tiny",
        "model": {"name_or_path": str(base / "composed"), "dtype": "float32"},
        "objective": {"name": name},
    }
    given["data"] = {"train": given["data"]["train"]}
    given["export"] = {"merge": False}
    return given, base / "train.jsonl"


@pytest.fixture(scope="module")
def of(tmp_path_factory, home) -> Callable[..., tuple[dict[str, Any], Path]]:  # noqa: F811
    """`made` of an objective in a new folder, with streamed rows (some of them `bad`) unless `plain`."""
    done: dict[str, Any] = {}

    def build(name: str, *, bad: dict[int, str] | None = None, plain: bool = False, **data: Any):
        folder = tmp_path_factory.mktemp(name)
        if name == "classification" and not done:
            made_once = fusion.recipe(home, folder / "first", train={"max_steps": 1}, evaluate={"models": ["adapter"]})
            mmft.train(
                made_once | {"export": {"merge": False}, "data": {"train": made_once["data"]["train"]}}, quiet=True
            )
            done["base"] = shutil.copytree(folder / "first" / "small" / "base", home / "composed")
        given, rows = made(name, folder, home)
        columns = given["data"]["train"][0].get("columns", {})
        here = split(rows, folder / "split", bad)
        source = {"path": str(here), "streaming": True, "name": "x", "columns": columns}
        parts = [{"path": str(here / f"{at}.jsonl"), "name": "x", "columns": columns} for at in range(2)]
        given["data"] = {**given["data"], **data, "train": parts if plain else [source]}
        return given, folder

    return build


def opened(given: dict[str, Any]) -> tuple[Recipe, Any, Streamed, StreamPlan]:
    """Recipe, renderer, stream and a plan of two micro-batches of four a step."""
    recipe = load_recipe(given)
    kind = kind_of(recipe)
    renderer = kind.renderer(recipe, load_backbone(recipe.model).processor)
    stream = opened_streams(recipe, [], QUIET)
    return recipe, renderer, stream, StreamPlan(len(stream), 4, 2, 1, 0, sets=stream.sets, draws=stream.draws)


def seen(stream: Streamed, renderer: Any, plan: StepPlan, *, rank: int = 0, workers: int = 0, start: int = 0):
    how = {"start_step": start, "stop_step": plan.steps_for(1), "rank": rank, "workers": workers, "pad_token_id": 0}
    return list(batches(stream, renderer, plan, **how))


@pytest.mark.parametrize("name", ALL)
def test_rows_and_batches_are_those_of_the_plain_reader(name, of):
    """Contrastive rows get the picture as a group that the plain reader gives by joining rows: numbers differ, and
    which texts belong to which picture does not."""
    given, _ = of(name)
    recipe, renderer, stream, plan = opened(given)
    two = [
        {**given["data"]["train"][0], "streaming": False, "path": f"{given['data']['train'][0]['path']}/{at}.jsonl"}
        for at in (0, 1)
    ]
    held = rows_as_read(load_recipe({**given, "data": {**given["data"], "train": two}}))
    plain = [one for one in held] if name != "kto" else None
    assert len(stream) == len(held)
    for at in range(len(stream)):
        ours, theirs = stream[at], held[at]
        if name in PAIRS:
            ours = replace(ours, tags={**theirs.tags})
        if name == "kto" and at == len(held) - 1:
            continue
        assert ours.id.split("-")[-1] and replace(ours, id="", where="") == replace(theirs, id="", where=""), at
    if plain is None or name == "grpo":
        return
    for step, micros in enumerate(seen(stream, renderer, plan)):
        rows = plan.step_rows(step)
        for number, micro in enumerate(micros):
            chosen = rows[number * 4 : number * 4 + 4]
            wanted = renderer.assemble([(replace(plain[row], id=stream[row].id), epoch) for row, epoch in chosen])
            for key, value in wanted.inputs.items():
                if key in (LEFT, RIGHT):
                    same = [
                        wanted.inputs[LEFT][:, None] == wanted.inputs[RIGHT],
                        micro.inputs[LEFT][:, None] == micro.inputs[RIGHT],
                    ]
                    assert torch.equal(*same)
                else:
                    assert torch.equal(micro.inputs[key], value), key
            assert torch.equal(micro.labels, wanted.labels) and micro.counted == wanted.counted


@pytest.mark.parametrize("name", ["contrastive", "dpo", "classification", "grpo"])
def test_a_bad_row_stops_the_run_or_the_next_good_one_takes_its_place(name, of):
    gone = {"contrastive": {"image": "gone.png", "caption": "x"}, "classification": {"photo": "gone.png", "y": "one"}}
    answer = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]}
    row = json.dumps(
        {
            **gone.get(name, {**answer, "prompt": answer["messages"][:1], "chosen": "a", "rejected": "b"}),
            **({} if name in gone else {"images": ["gone.png"]}),
        }
    )
    if name == "dpo":
        row = json.dumps({"prompt": "x", "chosen": "a"})
    given, _ = of(name, bad={3: "{broken", 4: row, 9: "[]"})
    _, renderer, stream, plan = opened(given)
    with pytest.raises(DataError):
        seen(stream, renderer, plan)
    given["data"]["max_bad_fraction"] = 0.2
    _, renderer, stream, plan = opened(given)

    def told(steps: Any) -> list[Any]:
        return [
            [(one.ids, [re.search(r"\d\.jsonl:\d+", text)[0] for text, _ in one.left_out]) for one in step]
            for step in steps
        ]

    whole = told(seen(stream, renderer, plan))
    left = {text for step in whole for _, rows in step for text in rows}
    half = plan.rows // 2
    assert left == {"0.jsonl:4", "0.jsonl:5", f"{9 // half}.jsonl:{9 % half + 1}"}
    assert all(len(ids) == 4 for step in whole for ids, _ in step)
    assert told(seen(stream, renderer, plan, workers=2)) == whole
    assert told(seen(stream, renderer, plan, start=1)) == whole[1:]
    ranks = [told(seen(stream, renderer, replace(plan, world=2), rank=rank)) for rank in range(2)]
    assert [[*one, *two] for one, two in zip(*ranks, strict=True)] == whole
    halves = [[ids for ids, _ in step] for step in told(seen(stream, renderer, plan.halved()))]
    assert [sum(step, ()) for step in halves] == [sum((ids for ids, _ in step), ()) for step in whole]


def test_long_rows_stop_the_run_or_are_left_out(of):
    given, _ = of("contrastive", bad={5: json.dumps({"image": "1.png", "caption": "w " * 30})})
    _, renderer, stream, plan = opened(given)
    with pytest.raises(DataError, match="tokens"):
        seen(stream, renderer, plan)
    given["data"]["over_length"] = "drop"
    _, renderer, stream, plan = opened(given)
    left = [one for step in seen(stream, renderer, plan) for micro in step for one in micro.left_out]
    assert len(left) == 1 and not left[0][1] and "tokens" in left[0][0]
    given["data"]["over_length"] = "truncate_text"
    _, renderer, stream, plan = opened(given)
    assert not any(micro.left_out for step in seen(stream, renderer, plan) for micro in step)


def losses(run: Path) -> list[Any]:
    told = [row for row in read_lines(run / "metrics.jsonl") if "loss" in row]
    return [
        {key: one for key, one in row.items() if key not in ("samples_per_second", "first_sampler_gap")} for row in told
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_killed_run_resumes_to_the_same_bytes(name, of):
    given, folder = of(name)
    mmft.train(given, quiet=True)
    whole = folder / "runs" / "tiny"
    again = {**given, "train": {**given["train"], "output_dir": str(folder / "again"), "dataloader_num_workers": 1}}
    path, run = folder / "again.yaml", folder / "again" / "tiny"
    path.write_text(yaml.safe_dump(again))
    pid = stable().start("train", path, "--quiet", log=folder / "log")
    wait_for_step(run, 3)
    os.kill(pid, signal.SIGKILL)
    stable().wait(pid)
    mmft.train(again, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(whole) and losses(run) == losses(whole)
    assert json.loads((whole / "training.json").read_text())["steps"] == 6


@pytest.mark.parametrize("name", ["contrastive", "kto", "classification"])
def test_two_processes_compute_what_one_does(name, of):
    given, folder = of(name)
    mmft.train(given, quiet=True)
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump({**given, "train": {**given["train"], "output_dir": str(folder / "two")}}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    outcome = run_process(*launch, "-m", "mmft", "train", path, "--quiet", ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err[-3000:]
    one, two = ([row["loss"] for row in losses(folder / name / "tiny")] for name in ("runs", "two"))
    assert two == pytest.approx(one, rel=1e-4)


def test_what_needs_all_rows_is_refused(of):
    for name, section, value, message in (
        (
            "classification",
            "objective",
            {"name": "classification", "balance": "sampling"},
            "counts the rows of each class",
        ),
        ("classification", "model", {"encoders": {"text": "x"}}, "composed of the classes"),
        (
            "classification",
            "objective",
            {"name": "classification", "cache_features": True},
            "features of all rows first",
        ),
        ("contrastive", "evaluate", {"class_tag": "kind"}, "classes off all training rows"),
        ("dpo", "objective", {"name": "dpo", "precompute_reference": True}, "precompute_reference looks at all rows"),
        ("dpo", "objective", {"name": "dpo", "image_weight": 1.0, "rejected_image": "other"}, "pictures of all rows"),
    ):
        given, _ = of(name)
        with pytest.raises(RecipeError, match=message):
            load_recipe({**given, section: value})
    for name, change, message in (("dpo", ranked, "the row gives 3 pairs"), ("kto", paired, "the row gives 2 thumbs")):
        given, folder = of(name)
        runs.rewrite(folder / "split" / "0.jsonl", change)
        with pytest.raises(DataError, match=message):
            mmft.train(given, quiet=True)


def ranked(row: dict[str, Any]) -> dict[str, Any]:
    answers = [row.pop("chosen"), row.pop("rejected"), "n"]
    return {**row, "answers": answers, "scores": [3, 1, 0]}


def paired(row: dict[str, Any]) -> dict[str, Any]:
    row.pop("label")
    chosen = row.pop("completion")
    return {**row, "chosen": chosen, "rejected": "n"}


def test_pictures_of_a_fetched_table_stay_with_its_rows(tmp_path):
    """A fetched shard may be thrown out at any time: what lies in it is read with the row, in cells and candidates."""
    pixels = {f"{at}.png": (pairs.pair_rows().parent / f"{at}.png").read_bytes() for at in range(3)}
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name, data in pixels.items():
            cells = {f"{name[0]}.json": json.dumps({"y": "one", "note": "x"}).encode(), name: data}
            for member, held in cells.items():
                info = tarfile.TarInfo(member)
                info.size = len(held)
                file.addfile(info, io.BytesIO(held))
    (tmp_path / "list.json").write_text(json.dumps({"shardlist": [{"url": "far://x/0.tar"}]}))
    section = DataSection(train=(DataSource(path=str(tmp_path / "list.json"), streaming=True, name="x"),))
    stream = open_streams(
        section,
        [],
        wanted=("table",),
        journal=QUIET,
        fetch=lambda _, to: shutil.copy(tmp_path / "0.tar", to),
        described=lambda rows, _: infer_columns(rows, declared={"y": "label"}),
    )
    rows = stream[:]
    shutil.rmtree(stream.streamed[0].files.folder)
    assert [read_bytes(row.cells["image"].value) for row in rows] == list(pixels.values())
    assert all(row.media == (row.cells["image"].value,) and row.cells["y"].kind == "label" for row in rows)
    ref = MediaRef(path="a.png")
    row = replace(rows[0], candidates=(Candidate("a", media=(ref,)), Candidate("b")))
    changed = row.with_media(lambda at, one: replace(one, path=f"{at} {one.path}"))
    assert changed.candidates[0].media[0].path == "0 a.png" and changed.candidates[1].media is None


@pytest.mark.parametrize("name", ["contrastive", "dpo", "classification", "grpo"])
def test_plan_trace_and_check_read_a_stream(name, of):
    given, folder = of(name, bad={3: "{broken"})
    given["data"]["max_bad_fraction"] = 0.1
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    plan = runs.cli("plan", path, "--json").json()
    rows = plan["data"]["train"]
    assert rows == {"contrastive": 32, "classification": 48}.get(name, 16)
    traced = runs.cli("trace", path, "--row", 1, "--json")
    assert traced.code == 0, traced.err
    found = mmft.check(path, out=folder / "bad.jsonl", workers=0, quiet=True)
    assert (found["rows"], [one["cause"] for one in found["causes"]][:1]) == (rows, ["json"])
