"""The loss told by data set: its parts are those of the rows alone, padded, in a line and with the fast head."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mmft.data.order import StepPlan
from mmft.data.packing import pack
from mmft.evaluation.by_source import source_curves, source_table
from mmft.evaluation.report import write_report
from mmft.fast import head
from tests.engine.runs import Record, make_engine
from tests.fast import packs
from tests.tiny import tiny_rows

NAMES = ("a", "b", "a", "c")


def _parts(logs, what):
    return {key.removeprefix(f"{what} of "): float(value) for key, value in logs.items() if key.startswith(what)}


@pytest.mark.parametrize("way", ["plain", "packed", "fast head"])
def test_parts_are_the_losses_of_the_rows_alone(way):
    rows = [replace(one, source=NAMES[at % 4]) for at, one in enumerate(packs.samples(3))]
    model = packs.adapted("llava")
    here = packs.setting(model, rows, StepPlan(rows=len(rows), micro_batch=8, micro_per_step=1, seed=1))
    work = packs.put_in(here)[1] if way == "packed" else packs.plain(here)
    if way == "fast head":
        work = head.install(here, work)
    try:
        (batch,) = packs.batches_of(here, work)
        assert (batch.labels.shape[0] == 1) == (way == "packed") and len(batch.ids) == 8
        found = work.objective.loss(work.adapted.model, work.prepare(batch))
        parts, terms = _parts(found.logs, "loss"), _parts(found.logs, "terms")
        assert set(parts) == set(NAMES) and sum(terms.values()) == found.count
        assert sum(parts.values()) == pytest.approx(float(found.sum.detach()), rel=1e-6)
    finally:
        work.release()
    for name in parts:
        ids = {one.id for one in rows if one.source == name}
        own = [row for row in here.steps.step_rows(0) if rows[row[0]].id in ids]
        total = count = 0.0
        for row, _ in own:
            single = replace(here, samples=[rows[row]], steps=StepPlan(rows=1, micro_batch=1, micro_per_step=1))
            (one,) = packs.batches_of(single, packs.plain(single))
            loss = packs.plain(single).objective.loss(model.model, one)
            total, count = total + float(loss.sum.detach()), count + loss.count
        assert parts[name] == pytest.approx(total, rel=1e-5) and terms[name] == count


def test_a_line_of_shared_pictures_counts_in_the_order_of_its_pieces():
    model = packs.adapted("llava")
    one, two, *_ = packs.samples(3, bare=False)
    again = replace(one, turns=two.turns)  # the first picture, another question
    rows = [replace(row, source=name) for row, name in ((one, "a"), (two, "b"), (again, "c"))]
    renderer = packs.setting(model, rows, StepPlan(rows=3, micro_batch=3, micro_per_step=1)).renderer
    rendered = [renderer.render(row) for row in rows]
    line = pack(rendered, shown=[0, 1, 0], media_ids=renderer.media_ids)
    counts = {row.source: int((row.labels[1:] != -100).sum()) for row in rendered}
    told = [(name, count) for name, count in line.counted if count]
    assert told == [(name, counts[name]) for name in ("a", "c", "b")] and len(line.counted) == 4
    assert line.supervised == sum(counts.values())


def test_steps_tell_every_set_and_the_report_shows_them(tmp_path):
    record = Record()
    engine, _ = make_engine(tmp_path, callbacks=(record,), micro=2, per_step=3)
    names = [f"set {at % 2}" for at in range(len(engine.job.samples))]
    samples = [replace(one, source=name) for one, name in zip(engine.job.samples, names, strict=True)]
    engine.job = replace(engine.job, samples=samples, sources=("set 0", "set 1", "never"))
    engine.fit(resume=False)
    for row in record.metrics:
        assert "loss/never" not in row
        terms = {name: row.get(f"terms/{name}", 0) for name in ("set 0", "set 1")}
        assert sum(terms.values()) == row["supervised_tokens"]
        total = sum(row.get(f"loss/{name}", 0) * count for name, count in terms.items())
        assert total == pytest.approx(row["loss"] * row["supervised_tokens"], rel=1e-6)
    lines = [{"step": at, **row} for at, row in enumerate(record.metrics, 1)]
    assert [len(points) for points in source_curves(lines).values()] == [len(lines)] * 2
    table = source_table(lines)
    assert [row[0] for row in table["rows"]] == ["set 0", "set 1"]
    assert float(table["rows"][0][2]) == pytest.approx(lines[0]["loss/set 0"], abs=1e-4)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    page = write_report(tmp_path, {"name": "x"}).read_text()
    assert "Training loss by data set" in page and "Loss by data set over steps" in page


def test_a_run_of_one_set_tells_its_loss_once(tmp_path):
    record = Record()
    tiny_rows(tmp_path / "data", 16)
    engine, _ = make_engine(tmp_path, callbacks=(record,))
    engine.fit(resume=False)
    assert not any(key.startswith(("loss/", "terms/")) for row in record.metrics for key in row)
    assert source_table([{"step": 1, "loss": 1.0}]) is None
