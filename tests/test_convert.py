"""`mmft convert` and `mmft stats`: what is written says the same as what was read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mmft
from mmft.data.audit import fingerprint
from mmft.data.formats import load_samples
from mmft.errors import DataError
from mmft.evaluation.bars import bars, bins_of, histogram
from mmft.recipe.schema import DataSource
from tests.data import small
from tests.data.test_layouts import TONE, frame, picture
from tests.data.test_tables import wav


def load(path, name="rows", **options):
    loaded = load_samples(DataSource(path=str(path), name=name, **options), seed=0)
    assert loaded.bad == []
    return loaded.samples


@pytest.fixture
def talks(tmp_path):
    for name in "ab":
        picture(tmp_path / "in" / f"{name}.png", ord(name))
    (tmp_path / "in" / "s.wav").write_bytes(wav(TONE))
    rows = [
        {"messages": [{"role": "user", "content": "<image>\n<image>Which?"}, {"role": "assistant", "content": "both"}],
         "images": ["a.png", "b.png"], "tags": {"type": "x"}, "answers": ["both", "all"]},
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"},
                      {"role": "assistant", "content": "me"}], "id": "plain"},
        {"messages": [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "a tone"}],
         "audios": ["s.wav"]},
    ]  # fmt: skip
    path = tmp_path / "in" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_back(out, to):
    return out if to in ("parquet", "webdataset") else out / "rows.jsonl"


@pytest.mark.parametrize("to", ["messages", "llava", "parquet", "webdataset"])
def test_conversations_say_the_same_in_every_form(talks, tmp_path, to):
    out = tmp_path / ("out.parquet" if to == "parquet" else "out")
    found = mmft.convert(talks, out, to=to, quiet=True)
    assert (found["rows"], found["bad"]) == (3, [])
    given = load(talks)
    again = load(read_back(out, to))
    assert [sample.id for sample in given] == [sample.id for sample in again]
    assert fingerprint(given) == fingerprint(again)
    twice = tmp_path / "twice"
    mmft.convert(read_back(out, to), twice, to="messages", quiet=True)
    assert fingerprint(load(twice / "rows.jsonl")) == fingerprint(given)
    with pytest.raises(DataError, match="something already"):
        mmft.convert(talks, out, to=to, quiet=True)


@pytest.mark.parametrize("to", ["messages", "parquet", "webdataset"])
def test_pairs_and_tables_too(tmp_path, to):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "s.wav").write_bytes(wav(TONE))
    rows = [{"image": "a.png", "captions": ["one", "two"], "negatives": ["three"], "group": "g"}]
    rows += [{"audio": "s.wav", "caption": "a tone"}]
    (tmp_path / "in" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / ("out.parquet" if to == "parquet" else "out")
    mmft.convert(tmp_path / "in" / "pairs.jsonl", out, to=to, quiet=True)
    given = load(tmp_path / "in" / "pairs.jsonl", "pairs")
    assert fingerprint(load(read_back(out, to), "pairs", format="pairs")) == fingerprint(given)
    table = frame(tmp_path / "in").rename(columns={"y": "label"})
    table.to_csv(tmp_path / "in" / "table.csv", index=False)
    out = tmp_path / ("table.parquet" if to == "parquet" else "table")
    if to == "webdataset":
        with pytest.raises(DataError, match="a shard has no columns"):
            mmft.convert(tmp_path / "in" / "table.csv", out, to=to, quiet=True)
        assert not out.exists()
        return
    mmft.convert(tmp_path / "in" / "table.csv", out, to=to, quiet=True)
    assert fingerprint(load(read_back(out, to))) == fingerprint(load(tmp_path / "in" / "table.csv"))


def test_what_cannot_be_written(talks, tmp_path):
    with pytest.raises(DataError, match="'lava' is no form[\\s\\S]*nearest: 'llava'"):
        mmft.convert(talks, tmp_path / "out", to="lava", quiet=True)
    picture(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "caption": "x"}))
    with pytest.raises(DataError, match="a caption has no question"):
        mmft.convert(tmp_path / "pairs.jsonl", tmp_path / "out", to="llava", quiet=True)


def test_stats(talks, tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.backbones.load.load_processor", lambda _: small.processor())
    talks.write_text("".join(line + "\n" for line in talks.read_text().splitlines()[:2]))
    found = mmft.stats(talks, model="small")
    assert (found["rows"], found["media_per_row"], found["media"]) == (2, {0: 1, 2: 1}, {"image": 2})
    assert found["width"]["max"] == 4 and found["aspect_ratio"]["mean"] == pytest.approx(4 / 3, abs=1e-3)
    assert found["tokens"]["max"] > found["tokens"]["min"] > 5 and found["answers"] == {"both": 1, "me": 1}
    frame(tmp_path).rename(columns={"y": "label"}).to_csv(tmp_path / "t.csv", index=False)
    table = mmft.stats(tmp_path / "t.csv")
    assert table["classes"] == {"0": 3, "1": 3} and table["largest_to_smallest_class"] == 1.0


def test_a_page_of_statistics(talks, tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.backbones.load.load_processor", lambda _: small.processor())
    talks.write_text("".join(line + "\n" for line in talks.read_text().splitlines()[:2]))
    found = mmft.stats(talks, model="small", html=tmp_path / "a" / "<b>.html")
    page = (tmp_path / "a" / "<b>.html").read_text()
    assert "Statistics of &lt;b&gt;" in page and page.count("<svg") == 7
    assert all(f"<h2>{name}</h2>" in page for name in ("width", "aspect ratio", "tokens", "media per row", "answers"))
    assert {key: found[key] for key in ("rows", "tokens")} == {
        key: mmft.stats(talks, model="small")[key] for key in ("rows", "tokens")
    }


@pytest.mark.parametrize("values", [[1, 1, 2, 5], [0.5, 0.25, 3.0], list(range(1000)), [7], [0.5]])
def test_bins_hold_every_value(values):
    counts, edges = bins_of(values)
    assert sum(counts) == len(values) and len(edges) == len(counts) + 1 <= 25
    assert edges == sorted(edges) and edges[0] <= min(values) and edges[-1] >= max(values)
    for count, low, high in zip(counts[:-1], edges[:-2], edges[1:-1], strict=True):
        assert count == sum(low <= value < high for value in values)


def test_bars_are_the_most_frequent_and_escaped():
    chart = bars({f"<{at}>": at + 1 for at in range(30)}, title="a & b", most=3)
    assert chart.count("<rect") == 3 and "&lt;29&gt;: 30" in chart and "<29>" not in chart and "a &amp; b" in chart
    assert bars({}, title="none") == "" and histogram([], title="none", x_label="x") == ""


def test_the_commands(talks, tmp_path):
    talks.write_text(talks.read_text() + "{broken\n")
    run = [sys.executable, "-m", "mmft"]
    done = subprocess.run([*run, "convert", talks, tmp_path / "o", "--to", "llava"], capture_output=True, text=True)
    assert done.returncode == 3 and "3 rows written" in done.stdout and "rows.jsonl:4: broken JSON" in done.stdout
    done = subprocess.run([*run, "stats", tmp_path / "o" / "rows.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0 and "aspect_ratio" in done.stdout, done.stderr
