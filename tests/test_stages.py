"""What the stages tell about rows that are left out, and what they refuse before a run starts."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mmft import stages
from mmft.data.audit import Audit
from mmft.data.formats import Loaded
from mmft.data.render import Renderer
from mmft.data.sample import Piece, Sample, Turn
from mmft.errors import DataError, RecipeError
from mmft.journal import Journal
from mmft.recipe.schema import TrainSection
from tests.data import small


def samples(count: int) -> list[Sample]:
    turns = (Turn("user", (Piece("text", "q"),)), Turn("assistant", (Piece("text", "a"),)))
    return [Sample(id=str(index), turns=turns) for index in range(count)]


def renderer(over_length: str, fitting: set[str]) -> Any:
    return SimpleNamespace(
        over_length=over_length, max_length=7, length=lambda sample: 7 if sample.id in fitting else 8 + int(sample.id)
    )


def events(folder) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_bad_rows_that_are_allowed_are_counted_and_listed(tmp_path, capsys):
    bad = [(f"rows.jsonl:{line}", f"reason {line}") for line in range(1, 6)]
    stages._tell_bad(Loaded(samples(15), bad, "qa", "mine"), Journal(tmp_path))
    assert "mine: 5 of 20 rows are bad and left out (rows.jsonl:1: reason 1;" in " ".join(
        capsys.readouterr().err.split("\n")
    )
    assert [event["kind"] for event in events(tmp_path)] == ["warning", "bad_rows"]
    assert events(tmp_path)[1]["rows"] == [list(row) for row in bad]


def test_good_rows_are_not_worth_a_word(tmp_path):
    stages._tell_bad(Loaded(samples(3), [], "qa", "mine"), Journal(tmp_path, quiet=True))
    assert events(tmp_path) == []


def test_rows_are_dropped_only_where_the_recipe_says_so():
    journal = Journal(None, quiet=True)
    rows = samples(3)
    assert stages.fitting(rows, renderer("error", {"0", "1", "2"}), journal, name="train") is rows
    assert stages.fitting(rows, renderer("truncate_text", set()), journal, name="train") is rows
    kept = stages.fitting(rows, renderer("drop", {"0", "2"}), journal, name="train")
    assert [sample.id for sample in kept] == ["0", "2"]


def test_rows_that_are_cut_or_shrink_are_counted_and_listed(tmp_path):
    proc, journal = small.processor("qwen2_vl"), Journal(tmp_path, quiet=True)
    rows = [small.sample("the dog " * 30, "a cat", id="long"), small.sample("Who?", "a cat", id="short")]
    cut = Renderer(proc, max_length=40, over_length="truncate_text")
    assert stages.fitting(rows, cut, journal, name="train") is rows
    wide = [small.sample("Who?", "a cat", size=(112, 112), id="wide"), rows[1]]
    room = Renderer(proc, max_length=10**6).length(wide[0]) - 1
    smaller = Renderer(proc, max_length=room, over_length="shrink_images")
    assert stages.fitting(wide, smaller, journal, name="train") is wide
    listed = [event for event in events(tmp_path) if event["kind"] == "long_rows"]
    assert [(event["done"], [row[1] for row in event["rows"]]) for event in listed] == [
        ("cut", ["long"]),
        ("shown smaller pictures", ["wide"]),
    ]
    with pytest.raises(DataError, match="the row has"):
        stages.fitting(rows, Renderer(proc, max_length=20, over_length="shrink_images"), journal, name="train")


def test_every_long_row_is_known_before_training_and_the_longest_are_named():
    with pytest.raises(DataError) as caught:
        stages.fitting(samples(4), renderer("error", {"2"}), Journal(None, quiet=True), name="held")
    assert [problem.what.split(" (")[0] for problem in caught.value.problems] == [
        "the row has 11 tokens",
        "the row has 9 tokens",
        "the row has 8 tokens",
    ]
    assert "one of 3 over-long rows of 4 in 'held'" in caught.value.problems[0].what
    assert "at most 7 tokens" in (caught.value.problems[0].allowed or "")


def test_a_set_of_which_nothing_is_left_is_refused():
    with pytest.raises(DataError) as caught:
        stages.fitting(samples(3), renderer("drop", set()), Journal(None, quiet=True), name="held")
    assert caught.value.problems[0].what == "all 3 rows of 'held' are longer than 7 tokens"
    assert caught.value.problems[0].do


@pytest.mark.parametrize(("unstopped", "said"), [(0, 0), (4, 1)])
def test_a_template_without_an_end_token_is_warned_about(tmp_path, monkeypatch, unstopped, said):
    seen: list[int] = []

    def audit(rows, _):
        seen.append(len(rows))
        return Audit(len(rows), 0, {}, len(rows), {}, (), unstopped, "")

    monkeypatch.setattr(stages, "audit", audit)
    some = stages.spaced(samples(100), stages.SAMPLED_ROWS, renderer("error", set()))
    stages._warn_unstopped(some, renderer("error", set()), Journal(tmp_path, quiet=True))
    assert seen == [stages.SAMPLED_ROWS]
    warnings = [event["text"] for event in events(tmp_path)]
    assert len(warnings) == said
    assert all(text.startswith("4 of 32 rows looked at have no end token") for text in warnings)


def test_a_tracker_that_is_not_there_is_refused():
    with pytest.raises(RecipeError) as caught:
        stages.make_accelerator(TrainSection(report_to=("tensorbord",)))
    problem = caught.value.problems[0]
    assert problem.where == "train.report_to[0]"
    assert "tensorboard" in (problem.allowed or "")


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    """What `train_stage` does with `report_to`, without a model."""
    pytest.importorskip("tensorboard")
    accelerator = stages.make_accelerator(TrainSection(report_to=("tensorboard",), output_dir=str(tmp_path)))
    accelerator.init_trackers("mine")
    assert len(accelerator.trackers) == 1
    accelerator.log({"loss": 1.0}, step=1)
    accelerator.end_training()
    assert list((tmp_path / "mine").glob("events.out.tfevents.*"))
