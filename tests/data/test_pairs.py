"""Pairs: columns to samples, several captions, groups, tokens and batches."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image

from mmft.data.formats import load_samples
from mmft.data.loader import assemble
from mmft.data.pairs import EXTRA, PairRenderer, group_of, merge_pairs
from mmft.errors import DataError
from mmft.recipe.schema import DataSource
from tests.objectives.pairs import pair_rows, tiny_dual


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_dual())


def _picture(folder, name="a.png"):
    Image.new("RGB", (8, 8), (200, 10, 10)).save(folder / name)
    return name


def _load(folder, rows, *, columns=None, form="auto"):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return load_samples(DataSource(path=str(path), format=form, columns=columns or {}), seed=0)


def test_a_caption_file_becomes_one_sample_a_picture(tmp_path):
    """A line for each caption, as in Flickr8k; the picture is the group."""
    names = [_picture(tmp_path, f"{n}.png") for n in range(2)]
    with (tmp_path / "captions.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        writer.writerows([[names[0], "one"], [names[1], "two"], [names[0], "uno"], [names[0], "one"]])
    loaded = load_samples(DataSource(path=str(tmp_path / "captions.csv")), seed=0)
    assert loaded.format == "pairs" and len(loaded.samples) == 4
    merged = merge_pairs(loaded.samples)
    assert [sample.answers for sample in merged] == [("one", "uno"), ("two",)]
    assert group_of(merged[0]) != group_of(merged[1])


def test_columns_lists_and_groups(tmp_path):
    name = _picture(tmp_path)
    rows = [
        {"picture": name, "text": "a cat", "wrong": ["a dog", "a dog"], "class": 7, "tags": {"kind": "x"}},
        {"picture": [name], "text": '["a cat", "one cat"]', "class": 7},
        {"picture": {"bytes": (tmp_path / name).read_bytes().hex(), "path": name}, "text": "x"},
    ]
    rows[2]["picture"] = {"path": name}
    loaded = _load(tmp_path, rows, columns={"image": "picture", "negatives": "wrong", "group": "class"})
    first, second, third = loaded.samples
    assert first.answers == ("a cat",) and first.negatives == ("a dog",) and first.tags == {"kind": "x", "group": "7"}
    assert second.answers == ("a cat", "one cat")
    assert group_of(first) == group_of(second) != group_of(third)
    assert len(merge_pairs(loaded.samples)) == 2


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"image": None, "text": "x"}, "the row has no picture"),
        ({"image": ["a.png", "a.png"], "text": "x"}, "the row has 2 pictures"),
        ({"image": "a.png", "text": "  "}, "a caption is empty"),
        ({"image": "a.png", "text": None}, "a caption is missing"),
        ({"image": "a.png", "captions": ["x", 3]}, "a caption is a int"),
        ({"image": "a.png", "text": "x", "negatives": [""]}, "a negative is empty"),
        ({"image": "a.png", "text": "x", "tags": [1]}, "`tags` is a list"),
        ({"image": "a.png", "text": "x", "id": 1.5}, "the id is a float"),
        ({"image": "gone.png", "text": "x"}, "gone.png"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, text):
    _picture(tmp_path)
    loaded = _load(tmp_path, [row, {"image": "a.png", "text": "good"}], form="pairs")
    assert len(loaded.samples) == 1
    ((where, reason),) = loaded.bad
    assert where.endswith("rows.jsonl:1") and text in reason


def test_a_batch_holds_both_sides_and_their_groups(processor):
    samples = load_samples(DataSource(path=str(pair_rows())), seed=0).samples[:9]
    renderer = PairRenderer(processor, max_length=64)
    batch = assemble(renderer, [(sample, 0) for sample in samples], pad_token_id=0)
    left, right = batch.inputs["left_groups"], batch.inputs["right_groups"]
    assert batch.inputs["pixel_values"].shape == (9, 3, 32, 32)
    assert len(right) == len(batch.inputs["input_ids"]) == 9 * 2 + 3 and int((right == EXTRA).sum()) == 3
    assert left[0] == left[8] and len(set(left.tolist())) == 8  # two shades of one colour are one group
    assert batch.supervised == 9 and batch.tokens == int(batch.inputs["attention_mask"].sum())
    text = processor.tokenizer.decode(batch.inputs["input_ids"][1], skip_special_tokens=True)
    assert text == samples[0].answers[1]


def test_captions_are_drawn_by_epoch(processor):
    sample = load_samples(DataSource(path=str(pair_rows())), seed=0).samples[0]
    renderer = PairRenderer(processor, max_length=64, captions=1, seed=3)
    drawn = [renderer.chosen(sample, epoch) for epoch in range(20)]
    assert {len(one) for one in drawn} == {1} and {one[0] for one in drawn} == set(sample.answers)
    assert drawn == [PairRenderer(processor, max_length=64, captions=1, seed=3).chosen(sample, e) for e in range(20)]


def test_texts_without_a_mask_have_the_length_of_the_tokenizer():
    from transformers import AutoProcessor

    renderer = PairRenderer(AutoProcessor.from_pretrained(tiny_dual("siglip")), max_length=64)
    found = renderer.encode_texts(["red", "a blue square"])
    assert set(found) == {"input_ids"} and found["input_ids"].shape == (2, 24)


def test_lengths_and_broken_pictures(tmp_path, processor):
    name = _picture(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    loaded = _load(tmp_path, [{"image": name, "text": "x" * 30}, {"image": "b.png", "text": "y"}])
    renderer = PairRenderer(processor, max_length=64)
    assert renderer.max_length == 24 and not renderer.fits(loaded.samples[0]) and renderer.fits(loaded.samples[1])
    with pytest.raises(DataError, match="not a picture that is read here") as caught:
        renderer.assemble([(loaded.samples[1], 0)])
    assert "rows.jsonl:2" in str(caught.value)
    with pytest.raises(DataError, match="need a processor with a tokenizer and an image processor"):
        PairRenderer(processor.tokenizer, max_length=8)
    assert torch.equal(
        renderer.encode_images(loaded.samples[:1])["pixel_values"],
        renderer.encode_images(loaded.samples[:1])["pixel_values"],
    )
