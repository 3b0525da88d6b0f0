"""Records in, scores out: counts by hand, groups, pairs, determinism."""

from __future__ import annotations

import json

import pytest

from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.errors import CheckpointError, DataError
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.scores import UNTAGGED, score_records
from mmft.evaluation.verdict import verdict
from tests.data import small


def record(index: int, base: str, adapter: str, name: str = "heldout", **tags: str) -> dict:
    answers = {"base": base, "adapter": adapter, "merged": adapter}
    fields = {"question": "?", "references": ["yes"], "tags": tags, "images": [], "answers": answers}
    return {"set": name, "id": f"r{index}", **fields}


@pytest.fixture
def records():
    rows = [
        record(i, "yes" if i % 4 == 0 else "no", "yes" if i % 4 else "no", type="ab"[i % 2], seen="xy"[i // 20])
        for i in range(40)
    ]
    return [*rows, record(0, "yes", "yes", "transfer"), record(1, "no", "yes", "transfer")]


def scored(records, **options):
    values = {"group_by": ["type", "seen"], "bootstrap_samples": 200, "seed": 1} | options
    return score_records(records, ["base", "adapter", "merged"], ["exact_match", "bleu"], **values)


def test_scores_sets_groups_and_pairs(records):
    report = scored(records)
    assert report["headline"] == "exact_match"
    assert report["scores"] == report["sets"]["heldout"]["scores"]
    heldout = report["sets"]["heldout"]
    assert heldout["scores"]["base"]["exact_match"]["value"] == 0.25
    assert heldout["scores"]["adapter"]["exact_match"]["value"] == 0.75
    assert heldout["scores"]["merged"] == heldout["scores"]["adapter"]
    assert heldout["rows"] == 40
    groups = heldout["groups"]
    assert set(groups) == {"type", "seen", "type,seen"}
    # Rows 0, 4, 8 .. are even: all of the base's hits are of type a.
    assert groups["type"]["a"]["scores"]["base"]["exact_match"]["value"] == 0.5
    assert groups["type"]["b"]["scores"]["base"]["exact_match"]["value"] == 0.0
    assert set(groups["type,seen"]) == {f"type={t},seen={s}" for t in "ab" for s in "xy"}
    assert groups["type,seen"]["type=a,seen=y"]["rows"] == 10
    pair = heldout["paired"]["adapter-base"]
    assert (pair["metric"], pair["difference"]) == ("exact_match", 0.5)
    assert pair["low"] < 0.5 < pair["high"]
    assert pair["mcnemar_p"] < 0.01
    assert set(pair["metrics"]) == {"exact_match", "bleu"}
    same = heldout["paired"]["merged-adapter"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    assert set(report["sets"]["transfer"]["groups"]["type"]) == {UNTAGGED}
    json.dumps(report, allow_nan=False)


def test_same_seed_same_report_and_sets_do_not_touch_each_other(records):
    assert scored(records) == scored(records)
    assert scored(records) != scored(records, seed=2)
    alone = scored(records[:40])
    assert alone["sets"]["heldout"] == scored(records)["sets"]["heldout"]
    ungrouped = scored(records, group_by=[])
    assert ungrouped["scores"] == alone["scores"]


def test_missing_answers_and_empty_records_are_errors(records):
    del records[3]["answers"]["merged"]
    with pytest.raises(DataError, match="no answer of merged") as error:
        scored(records)
    assert "row r3" in str(error.value)
    with pytest.raises(DataError, match="nothing to score: 0 rows"):
        scored([])


def test_verdicts_in_words(records):
    report = scored(records)
    text = verdict(report, records)
    assert text.startswith("The adapter raised exact match from 0.25 to 0.75 (+0.50, 95 % interval +0.")
    assert text.endswith("on 40 rows of heldout, and the merged model gives the same answers (40 of 40).")
    records[2]["answers"]["merged"] = "?"
    assert "the merged model answers 1 of 40 rows differently" in verdict(scored(records), records)
    for row in records:
        row["answers"]["base"], row["answers"]["adapter"] = row["answers"]["adapter"], row["answers"]["base"]
    assert verdict(scored(records)).startswith("The adapter lowered exact match from 0.75 to 0.25")
    for row in records:
        row["answers"]["adapter"] = row["answers"]["base"]
    assert verdict(scored(records)).startswith("The adapter made no clear difference: exact match went from 0.75 to")
    only = score_records(records, ["base"], ["token_f1"], bootstrap_samples=50)
    assert verdict(only).startswith("On 40 rows of heldout, the base model reached 0.75 (")
    assert verdict({"name": "x"}) == "This run was trained but not evaluated."


def sample(name: str, *media: MediaRef, answers: tuple[str, ...] = ()) -> Sample:
    turns = (Turn("user", (Piece("image"), Piece("text", " Où ? "))), Turn("assistant", (Piece("text", "là 🐱"),)))
    return Sample(id=name, turns=turns, media=media, answers=answers, tags={"type": "where"}, where="rows.jsonl:3")


def test_store_keeps_models_side_by_side_and_reads_back(tmp_path):
    pictures = tmp_path / "data"
    small.write(pictures, "one.png", small.picture())
    rows = [sample("a", MediaRef(path="one.png", root=pictures)), sample("b", answers=("x", "y"))]
    store = PredictionStore()
    store.add("s", "base", rows, answers=["ici", "x"])
    store.add("s", "adapter", rows, answers=["là 🐱", "\u2028</script>"])
    store.add("other", "base", rows[:1], answers=["z"])
    store.write(tmp_path / "predictions.jsonl")
    again = PredictionStore.read(tmp_path / "predictions.jsonl")
    assert again.records == store.records
    assert again.models == ("base", "adapter")
    assert again.records[0] == {
        "set": "s",
        "id": "a",
        "question": "Où ?",
        "references": ["là 🐱"],
        "tags": {"type": "where"},
        "images": [str(pictures / "one.png")],
        "answers": {"base": "ici", "adapter": "là 🐱"},
    }
    assert again.records[1]["references"] == ["x", "y"]
    assert len(again.records) == 3


def test_pictures_that_are_bytes_are_kept_in_the_run_folder(tmp_path):
    rows = [sample("a", MediaRef(data=small.encoded(small.picture()))), sample("b", MediaRef(data=b"broken"))]
    store = PredictionStore()
    store.add("s", "base", rows, answers=["", ""], folder=tmp_path)
    name = store.records[0]["images"][0]
    assert (tmp_path / name).read_bytes() == rows[0].media[0].data
    bare = PredictionStore()
    bare.add("s", "base", rows, answers=["", ""])
    assert bare.records[0]["images"] == []


def test_store_errors(tmp_path):
    store = PredictionStore()
    with pytest.raises(DataError, match="1 answers for 2 rows"):
        store.add("s", "base", [sample("a"), sample("b")], answers=["x"])
    with pytest.raises(DataError, match="'a' occurs twice"):
        store.add("s", "base", [sample("a"), sample("a")], answers=["x", "y"])
    silent = Sample(id="q", turns=(Turn("user", (Piece("text", "?"),)),), where="rows.jsonl:9")
    with pytest.raises(DataError, match="no answer to compare with") as error:
        store.add("s", "base", [silent], answers=["x"])
    assert "rows.jsonl:9" in str(error.value)
    with pytest.raises(CheckpointError, match="no predictions here"):
        PredictionStore.read(tmp_path / "predictions.jsonl")
    (tmp_path / "predictions.jsonl").write_text('{"set": "s"}\n')
    with pytest.raises(CheckpointError, match="id, question, references, tags, images, answers missing") as error:
        PredictionStore.read(tmp_path / "predictions.jsonl")
    assert "predictions.jsonl:1" in str(error.value)
    (tmp_path / "predictions.jsonl").write_text("\n{oops\n")
    with pytest.raises(CheckpointError, match="not JSON") as error:
        PredictionStore.read(tmp_path / "predictions.jsonl")
    assert "predictions.jsonl:2" in str(error.value)
