"""Captions of made scenes: what they say is what is in the picture, and no test layout was trained on."""

from __future__ import annotations

import json

import pytest

from mmft.data.scenes_captions import CAPTION_SETS, build_captions, captions, plural, shipped_captions
from mmft.errors import DataError


def test_captions_say_all_in_three_orders():
    assert captions({"top left": "cat", "bottom left": "apple", "bottom right": "apple"}) == [
        "a cat at the top left and two apples at the bottom",
        "two apples at the bottom and a cat at the top left",
        "at the top left a cat and at the bottom two apples",
    ]
    assert captions({"top right": "owl"}) == ["an owl at the top right", "at the top right an owl"]
    assert captions({"top left": "fox", "bottom right": "fox"})[0] == "two foxes at the top left and the bottom right"
    three = captions({"top left": "cat", "top right": "dog", "bottom left": "bee"})[0]
    assert three == "a cat at the top left, a dog at the top right and a bee at the bottom left"


def test_plurals_are_spelled():
    words = {
        "cat": "cats",
        "fox": "foxes",
        "torch": "torches",
        "cherry": "cherries",
        "key": "keys",
        "glasses": "glasses",
    }
    assert {word: plural(word) for word in words} == words


def test_sets_own_layouts_of_their_own():
    owned = sorted(spec.buckets for spec in CAPTION_SETS.values())
    assert all(one[1] <= other[0] for one, other in zip(owned, owned[1:], strict=False))


def test_a_set_is_made_twice_alike(tmp_path):
    pytest.importorskip("resvg_py", reason="needs the extra demo")
    made = [build_captions("openmoji-test", tmp_path / name, limit=6) for name in ("one", "other")]
    assert made[0].read_bytes() == made[1].read_bytes()
    rows = [json.loads(line) for line in made[0].read_text().splitlines()]
    assert [row["tags"]["concepts"] for row in rows[:4]] == ["trained", "new", "trained", "new"]
    for row in rows:
        images = [path.parent / row["image"] for path in made]
        assert images[0].read_bytes() == images[1].read_bytes()
        assert 1 <= len(row["captions"]) <= 3


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(DataError, match="openmoji-test"):
        shipped_captions("openmoji-tests")
