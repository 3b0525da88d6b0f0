"""The page: self-contained, safe with hostile texts, rebuilt from the run folder, and really drawn by a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmft.errors import CheckpointError
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.cards import Pictures, changed_cards
from mmft.evaluation.plots import Lane, Mark, forest_chart, line_chart, number, thin, ticks
from mmft.evaluation.report import rebuild_report, write_report
from mmft.evaluation.scores import score_records
from tests.data import small

HOSTILE = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(2)> </details></pre> {{ 7*7 }} \u202e\x00'


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def make_run(folder: Path, rows: int = 60, question: str = "Where is the cat?") -> Path:
    folder.mkdir(exist_ok=True)
    records = []
    for index in range(rows):
        small.write(folder, f"pics/{index % 6}.png", small.picture(index % 6, (400, 300)))
        base = "left" if index % 3 == 0 else "right"
        adapter = "left" if index % 5 else "under"
        records.append(
            {
                "set": "heldout",
                "id": f"row-{index:03}",
                "question": question,
                "references": ["left"],
                "tags": {"type": "where" if index % 2 else "what"},
                "images": [f"pics/{index % 6}.png"],
                "answers": {"base": base, "adapter": adapter, "merged": adapter},
            }
        )
    models, metrics = ["base", "adapter", "merged"], ["exact_match", "token_f1"]
    report = score_records(records, models, metrics, group_by=["type"], bootstrap_samples=100)
    report["name"] = "a run"
    report["training"] = {
        "steps": 30,
        "seconds": 95.0,
        "peak_memory": 2.5e9,
        "seed": 7,
        "parts": [["language", "attention", "8", "12,345"]],
        "versions": {"torch": "2.15.0"},
    }
    report["merge"] = {"tensors": 10, "proof": {"untouched": 6, "outputs": {"max_abs_difference": 1.5e-6}}}
    PredictionStore(records).write(folder / "predictions.jsonl")
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "recipe.yaml").write_text("name: a run\n")
    lines = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-4 / step} for step in range(1, 31)]
    lines += [{"step": 15, "eval_loss": 0.4}, {"step": 16, "loss": "nan"}, {"note": "no step"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_page_says_what_happened_and_asks_for_nothing(run):
    path = rebuild_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "The adapter raised exact match from 0.33 to 0.80 (+0.47, 95 % interval" in page.text
    assert "merged model gives the same answers (60 of 60)" in page.text
    for words in (
        "language",
        "12,345",
        "2.50 GB",
        "1 min 35 s",
        "1.5e-06",
        "proof: untouched",
        "name: a run",
        "2.15.0",
    ):
        assert words in page.text, words
    for words in ("Scores on heldout", "where", "Loss", "Learning rate", "Merge and its proof"):
        assert words in page.text, words
    assert "script" not in {tag for tag, _ in page.tags}
    assert "link" not in {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(values for tag, values in page.tags if values.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")
    assert len(text) < 3_000_000


def test_hostile_texts_appear_as_texts(tmp_path):
    run = make_run(tmp_path / "run", rows=8, question=HOSTILE)
    report = json.loads((run / "report.json").read_text())
    report["name"] = HOSTILE
    report["training"]["parts"] = [[HOSTILE, "x", "1", "2"]]
    report["merge"] = {HOSTILE: HOSTILE}
    report["sets"] = {HOSTILE: report["sets"]["heldout"]}
    report["sets"][HOSTILE]["groups"]["type"] = {HOSTILE: report["sets"][HOSTILE]["groups"]["type"]["what"]}
    (run / "recipe.yaml").write_text(HOSTILE)
    text = write_report(run, report).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "onerror=alert(2)>" not in text.replace("onerror=alert(2)&gt;", "")
    assert all(tag != "script" for tag, _ in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7*7 }}" in page.text
    assert {tag for tag, values in page.tags if "onerror" in values} == set()


def test_rebuilding_gives_the_same_page(run):
    first = rebuild_report(run).read_bytes()
    assert rebuild_report(run).read_bytes() == first
    report = json.loads((run / "report.json").read_text())
    explicit = write_report(
        run,
        report,
        metrics_jsonl=run / "metrics.jsonl",
        predictions=PredictionStore.read(run / "predictions.jsonl").records,
    )
    assert explicit.read_bytes() == first


def test_a_bare_run_still_gets_a_page(tmp_path):
    (tmp_path / "report.json").write_text('{"name": "bare"}')
    text = rebuild_report(tmp_path).read_text()
    assert "trained but not evaluated" in text
    with pytest.raises(CheckpointError, match="no report yet"):
        rebuild_report(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        rebuild_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no object"):
        rebuild_report(tmp_path)


def test_cards_pick_what_changed(run):
    records = PredictionStore.read(run / "predictions.jsonl").records
    worst, best = changed_cards(records, "exact_match", folder=run, limit=20)
    assert (len(worst), len(best)) == (12, 20)
    # base right (i % 3 == 0) and adapter wrong (i % 5 == 0): 0, 15, 30, 45 are lost; then wrong before and after.
    assert [card.id for card in worst[:5]] == ["row-000", "row-015", "row-030", "row-045", "row-005"]
    assert [card.kind for card in worst[3:5]] == ["lost", "still wrong"]
    assert all(card.kind == "gained" for card in best)
    assert [answer.verdict for answer in best[0].answers] == ["wrong", "right", "right"]
    assert worst[0].pictures[0].startswith("data:image/jpeg;base64,")
    for metric in ("bleu", "cider", "vqa_accuracy", "rouge_l", "token_f1"):
        assert changed_cards(records, metric, folder=run)[1]
    assert changed_cards([], "exact_match", folder=run) == ([], [])


def test_pictures_are_small_and_a_lost_one_is_said(run, tmp_path):
    import base64
    import io

    pictures = Pictures(run)
    uri = pictures.uri("pics/0.png")
    assert uri is not None
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (image.format, max(image.size)) == ("JPEG", 192)
    (tmp_path / "text.png").write_text("no picture")
    assert pictures.uri("pics/none.png") is None
    assert pictures.uri(str(tmp_path / "text.png")) is None
    assert pictures.uri("../../etc/passwd") is None
    assert Pictures(run, budget=10).uri("pics/0.png") is None
    shutil.rmtree(run / "pics")
    assert "1 picture not shown" in rebuild_report(run).read_text()


def test_hundreds_of_rows_and_groups_stay_small(tmp_path):
    run = make_run(tmp_path / "run", rows=20)
    records = PredictionStore.read(run / "predictions.jsonl").records
    many = []
    for index in range(600):
        row = records[index % 20] | {"id": f"x{index}", "question": "long " * 2000, "tags": {"type": f"kind {index}"}}
        many.append(row)
    report = score_records(many, ["base", "adapter", "merged"], ["token_f1"], group_by=["type"], bootstrap_samples=20)
    page = write_report(run, report | {"name": "big"}, predictions=many).read_text()
    assert len(page) < 3_000_000
    assert "576 more values are in report.json" in page


def test_ticks_and_numbers():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0, 2e-4, count=4) == pytest.approx([0, 5e-5, 1e-4, 1.5e-4, 2e-4])
    assert ticks(3, 3) == [3]
    assert [number(value) for value in (0, 0.25, 100, 1e-4, 1500000, 1234.0)] == [
        "0",
        "0.25",
        "100",
        "1e-4",
        "1.5e6",
        "1234",
    ]


def test_thinning_keeps_every_spike():
    points = [(float(step), math.sin(step / 50)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 502
    assert (4321.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:10]) == points[:10]


def test_charts_survive_what_runs_produce():
    assert line_chart({"train": []}, title="x") == ""
    assert forest_chart([], title="x", series=[]) == ""
    only_nan = [(1.0, math.nan), (2.0, math.inf)]
    assert line_chart({"train": only_nan}, title="x") == ""
    one = line_chart({"train": [(1.0, 0.0)], "eval": only_nan}, title="<b>")
    assert "nan" not in one and "inf" not in one and "<b>" not in one
    assert line_chart({"train": [(1.0, 1e-3), (2.0, 10.0), (3.0, 0.0)]}, title="x", log_y=True)
    flat = forest_chart([Lane("a", "1 row", (Mark("base", 0.0, 0.0, 0.0),))], title="x", series=["base"])
    assert "nan" not in flat
    wide = forest_chart([Lane("a", "", (Mark("base", 3.0, 2.0, 4.0),))], title="x", series=["base"])
    assert ">4</text>" in wide


def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no headless browser: install the package `chromium` to draw the page")
    return found


def test_a_browser_draws_the_page(run, tmp_path):
    program = browser()
    rebuild_report(run)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}"]
    address = (run / "report.html").as_uri()
    picture = tmp_path / "page.png"
    command = [program, *flags, *profile, f"--screenshot={picture}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    dom = subprocess.run(
        [program, *flags, *profile, "--dump-dom", address], check=True, capture_output=True, timeout=120, text=True
    ).stdout
    assert "The adapter raised exact match from 0.33 to 0.80" in dom
    with Image.open(picture) as image:
        assert image.size == (1200, 2400)
        colours = image.convert("RGB").getcolors(maxcolors=1_000_000)
    assert colours is not None
    most, total = max(count for count, _ in colours), sum(count for count, _ in colours)
    assert len(colours) > 200, "the page is nearly blank"
    assert most / total < 0.9
