"""`mmft check`: every spoilt row is found with its line and reason, and no other."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc

import pytest

import mmft
from mmft.data.causes import CAUSES, MADE_PLAIN, cause_of, remedies
from mmft.data.clean import write_clean
from mmft.data.formats import load_samples
from mmft.data.inspect_rows import Look, inspect_rows
from mmft.data.inspect_sets import Places
from mmft.data.likeness import Likes, likeness
from mmft.data.render import Renderer
from mmft.errors import DataError, RecipeError
from mmft.recipe.schema import DataSource
from tests.data import small, spoilt
from tests.runs import read_lines, values


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "data"
    small.processor().save_pretrained(folder.parent / "model")
    return folder, spoilt.make(folder, rows=400, of_each=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_spoilt_rows_are_found(made, workers, tmp_path, monkeypatch):
    folder, expected = made
    assert len(set(expected.values())) == 20 and len(expected) == 40
    options = {"against": [folder / "eval.jsonl"], "workers": workers, "quiet": True, "max_length": 2000}
    monkeypatch.setattr("mmft.checking.load_processor", lambda _: small.processor())
    found = mmft.check(
        [folder / "train.jsonl"], model="small", out=tmp_path / "bad.jsonl", fix=tmp_path / "clean.jsonl", **options
    )
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {int(row["where"].rsplit(":", 1)[1]): row["cause"] for row in rows} == expected
    assert all(row["reason"] for row in rows) and found["bad"] == 40 and found["rows"] == 420
    assert {one["cause"]: one["rows"] for one in found["causes"]} == dict.fromkeys(spoilt.KINDS, 2)
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "clean.jsonl").read_bytes() == b"".join(
        line for at, line in enumerate(lines, 1) if at not in expected
    )
    os.replace(tmp_path / "clean.jsonl", folder / "clean.jsonl")
    again = mmft.check([folder / "clean.jsonl"], model="small", out=tmp_path / "none", **options)
    assert again["bad"] == 0 and not again["do"] and found["do"].startswith("train on the files above; ")
    assert not (tmp_path / "none").exists()
    (folder / "clean.jsonl").unlink()


def test_the_command_prints_a_table_and_has_an_exit_code(made, tmp_path):
    folder, expected = made
    run = [sys.executable, "-m", "mmft", "check", str(folder / "train.jsonl"), "--out", "bad.jsonl", "--quiet"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 3, done.stderr
    assert re.search(r"json +2 +train.jsonl:", done.stdout), done.stdout
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 36  # no model: no lengths; no evaluation set
    told = done.stdout.splitlines()[-2]  # before the note that tokens are not counted
    assert told.startswith("  do      mend the rows, or --fix OUT writes") and "--allow animated" in told, done.stdout
    assert "data.max_length" not in told and "max_bad_fraction" not in told  # fields of a recipe
    allowed = ",".join(cause for cause in CAUSES if cause not in ("over_long", "leak"))
    done = subprocess.run([*run, "--allow", allowed], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and "  do " not in done.stdout, done.stdout


def test_what_to_do_fits_what_was_found():
    asked = {"held_out": False, "fixed": False, "recipe": True}
    assert remedies(set(), **asked) == ""
    assert remedies({"json"}, **asked).count("; ") == 1 and "max_bad_fraction" in remedies({"json"}, **asked)
    long = remedies({"over_long", "alpha"}, **asked)
    assert "data.over_length" in long and "--allow alpha lets" in long and "max_bad_fraction" not in long
    assert remedies({"leak"}, **{**asked, "fixed": True}) == "train on the files above"
    assert remedies(set(), **{**asked, "held_out": True}).startswith("mend the rows of evaluation sets")
    assert {*MADE_PLAIN} < {*CAUSES}


def test_what_is_asked_wrongly(made, tmp_path):
    folder, _ = made
    with pytest.raises(RecipeError, match="'alfa' is no cause[\\s\\S]*nearest: 'alpha'"):
        mmft.check([folder / "train.jsonl"], allow=["alfa"], quiet=True)
    with pytest.raises(DataError, match="would overwrite its source"):
        mmft.check([folder / "eval.jsonl"], fix=folder / "eval.jsonl", out=tmp_path / "x", quiet=True)
    with pytest.raises(DataError, match="no data file"):
        mmft.check([folder / "trian.jsonl"], quiet=True)


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_clean_sets_of_every_kind_of_file(tmp_path, suffix):
    import pandas as pd

    frame = pd.DataFrame({"question": ["a", "b", "c"], "answer": ["x", " ", "z"]})
    path, out = tmp_path / f"rows.{suffix}", tmp_path / f"clean.{suffix}"
    if suffix == "json":
        path.write_text(frame.to_json(orient="records"))
    else:
        getattr(frame, f"to_{suffix}")(path, index=False)
    found = mmft.check([path], fix=out, out=tmp_path / "bad", quiet=True)
    if suffix == "json":  # all rows of a file written in one line stand at line 1
        assert found["bad"] == 1
        return
    assert found["fixed"][0]["rows"] == 2 and found["causes"][0]["cause"] == "empty_answer"
    assert [sample.question for sample in load_samples(DataSource(path=str(out)), seed=0).samples] == ["a", "c"]


def streamed(folder, to, *names):
    """A recipe's values: files as one streamed set."""
    (to / "list.json").write_text(json.dumps({"shardlist": [{"url": name} for name in names]}))
    return values(to, {"data.train": [{"path": str(to / "list.json"), "streaming": True, "media_root": str(folder)}]})


def test_a_streamed_set_is_found_out_shard_by_shard(made, tmp_path, monkeypatch):
    """The spoilt rows in two shards, ten at a time: duplicates and leaks reach over shards, and all else is as held."""
    folder, expected = made
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    half, texts = len(lines) // 2, {"0.jsonl": b"".join(lines[: len(lines) // 2])}
    texts["1.jsonl"] = b"".join(lines[half:])
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    monkeypatch.setattr("mmft.data.inspect_sets._ROWS", 10)
    monkeypatch.setattr("mmft.checking._renderer", lambda _: (Renderer(small.processor(), max_length=2000), []))
    recipe = streamed(folder, tmp_path, *texts)
    recipe["data"]["eval"] = [{"path": str(folder / "eval.jsonl"), "name": "held"}]
    found = mmft.check(recipe, out=tmp_path / "bad.jsonl", fix=tmp_path / "clean", workers=0, quiet=True)
    rows = read_lines(tmp_path / "bad.jsonl")
    places = {(row["where"].rpartition("/")[2]): row["cause"] for row in rows}
    assert places == {f"{(at - 1) // half}.jsonl:{(at - 1) % half + 1}": cause for at, cause in expected.items()}
    assert found["bad"] == 40 and found["rows"] == 420 and [one["rows"] for one in found["sets"]] == [half, half, 20]
    assert {one["cause"]: one["rows"] for one in found["causes"]} == dict.fromkeys(spoilt.KINDS, 2)
    kept = b"".join((tmp_path / "clean" / name).read_bytes() for name in texts)
    assert kept == b"".join(line for at, line in enumerate(lines, 1) if at not in expected)


def test_rows_of_a_stream_are_not_held(tmp_path, monkeypatch):
    """Four times the rows of 4 KB take no more memory, beyond what counts them."""
    monkeypatch.setattr("mmft.data.inspect_sets._WEIGHT", 1 << 20)
    monkeypatch.setattr("mmft.checking._renderer", lambda _: (None, []))
    peaks = []
    for count in (1000, 4000):
        turns = [
            [{"role": "user", "content": f"{at} " * 900}, {"role": "assistant", "content": "x"}] for at in range(count)
        ]
        (tmp_path / f"{count}.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
        del turns
        recipe = streamed(tmp_path, tmp_path, f"{count}.jsonl") | {"quantization": {}}
        recipe["data"]["eval"] = []
        tracemalloc.start()
        found = mmft.check(recipe, out=tmp_path / "bad.jsonl", workers=0, quiet=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (found["rows"], found["bad"]) == (count, 0)
    assert max(peaks) < 8 << 20 and peaks[1] < 1.5 * peaks[0], peaks


def test_places_are_the_first_ones(monkeypatch):
    draw, known, places = random.Random(1), {}, Places()
    for at in range(5000):
        text = f"{draw.randrange(2000)} \ud800é"
        assert places.first(text, str(at)) == known.get(text)
        known.setdefault(text, str(at))
    places.close()


def test_a_clean_parquet_file_keeps_its_row_groups(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, out = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table = pa.table({"question": list("abcdefg"), "n": range(7)})
    pq.write_table(table, path, row_group_size=3)
    assert write_clean(path, out, {f"{path}:1", f"{path}:5", f"{path}:7"}) == 4
    assert pq.read_table(out) == table.take([1, 2, 3, 5])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_row_that_kills_its_process_is_named(made, monkeypatch):
    folder, _ = made
    samples = load_samples(DataSource(path=str(folder / "eval.jsonl")), seed=0).samples * 5
    import mmft.data.inspect_rows as module

    real = module.look_at

    def deadly(sample, look):
        if sample is samples[41]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(sample, look)

    monkeypatch.setattr(module, "look_at", deadly)
    seen = inspect_rows(samples, Look(10**6), workers=2)
    dead = [at for at, one in enumerate(seen) if one.reasons]
    assert set(dead) == {at for at, sample in enumerate(samples) if sample is samples[41]} and len(seen) == 100
    assert cause_of(seen[41].reasons[0]) == "other"


def test_looks():
    likes = Likes()
    for seed in range(50):
        likes.add(likeness(spoilt.picture(seed)), str(seed))
    import io

    from PIL import Image

    again = Image.open(io.BytesIO(spoilt.encoded(spoilt.picture(7), "JPEG", quality=70))).convert("RGB")
    assert likes.find(likeness(again)) == likes.find(likeness(again.resize((96, 96)))) == "7"
    assert all(likes.find(likeness(spoilt.picture(seed))) is None for seed in range(100, 400))
    assert not likeness(Image.new("RGB", (20, 20), (9, 9, 9))).telling
    ground = Image.new("RGB", (96, 96), (200, 220, 210))
    held, other = ground.copy(), ground.copy()
    held.paste((250, 230, 40), (60, 60, 76, 84))
    other.paste((90, 90, 100), (60, 60, 76, 84))
    likes.add(likeness(held), "small thing")
    assert likes.find(likeness(held.resize((64, 64)))) == "small thing" and likes.find(likeness(other)) is None
