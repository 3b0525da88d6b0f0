"""Folders, caption files and tables as data sets: what they are read as, and which rows are bad."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmft.data.audit import fingerprint
from mmft.data.formats import load_many, load_samples
from mmft.data.sample import Cell, MediaRef
from mmft.data.table_rows import columns_of, open_sample, sample_classes, table_samples
from mmft.data.tables import infer_columns
from mmft.errors import DataError
from mmft.recipe.schema import DataSection, DataSource
from tests.data.test_tables import wav

TONE = np.sin(np.arange(800) / 5)[:, None] * 0.5


def load(path, **options):
    wanted = options.pop("wanted", ())
    return load_samples(DataSource(path=str(path), **options), seed=0, wanted=wanted)


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (seed, 10, 20)).save(path)
    return path.name


# ---------------------------------------------------------------- folders


@pytest.fixture
def stems(tmp_path):
    for group, names in {"cats": "ab", "dogs": "cde"}.items():
        for name in names:
            picture(tmp_path / group / f"{name}.png", ord(name))
            (tmp_path / group / f"{name}.wav").write_bytes(wav(TONE))
            (tmp_path / group / f"{name}.txt").write_text(f"this is {name}\n")
    (tmp_path / "dogs" / "c.wav").unlink()
    (tmp_path / ".hidden.png").write_bytes(b"x")
    return tmp_path


def test_files_that_share_a_stem_are_a_tables_row(stems):
    loaded = load(stems, wanted=("table",))
    assert (loaded.format, loaded.layout, loaded.bad) == ("table", "folder", [])
    assert loaded.columns.kinds == {
        "id": "id", "image": "image", "text": "text", "audio": "audio", "label": "label"
    }  # fmt: skip
    assert [sample.id for sample in loaded.samples] == ["cats/a", "cats/b", "dogs/c", "dogs/d", "dogs/e"]
    first, third = loaded.samples[0], loaded.samples[2]
    assert first.cells["text"] == Cell("text", "this is a") and first.cells["label"].value == "cats"
    assert first.media == (
        MediaRef("image", path="cats/a.png", root=stems),
        MediaRef("audio", path="cats/a.wav", root=stems),
    )
    assert third.cells["audio"] == Cell("audio", None)
    opened = open_sample(first)
    assert opened["image"].size == (4, 3) and opened["audio"].shape == (800,) and opened["text"] == "this is a"
    assert open_sample(third)["audio"] is None
    assert sample_classes(loaded.samples) == (("cats", "dogs"), [0, 0, 1, 1, 1])
    assert columns_of(loaded.samples).modalities == {"image": ("image",), "text": ("text",), "audio": ("audio",)}
    assert loaded.told().splitlines()[0].endswith("5 rows read as 'table', lying as 'folder'")


def test_files_that_share_a_stem_are_pairs(stems):
    loaded = load(stems, columns={"audio": "none"})
    assert loaded.format == "pairs" and loaded.bad == []
    assert loaded.samples[0].answers == ("this is a",) and loaded.samples[0].media[0].kind == "image"
    sounds = load(stems, columns={"image": "none"})
    assert [sample.media[0].kind for sample in sounds.samples] == ["audio"] * 4
    assert sounds.bad == [(f"{stems / 'dogs' / 'c'}.*", "the row has no picture")]
    both = load(stems)
    assert len(both.samples) == 1 and "one medium in a pair" in both.bad[0][1]


def test_a_text_without_a_picture_is_named(tmp_path):
    picture(tmp_path / "a.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    loaded = load(tmp_path)
    assert [sample.id for sample in loaded.samples] == ["a"] and loaded.bad[0][1] == "the row has no picture"
    table = load(tmp_path, format="folder", wanted=("table",))
    assert [sample.cells["image"].value is None for sample in table.samples] == [False, True]


def test_json_beside_a_stem_and_what_is_wrong_there(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.jpg")
    (tmp_path / "a.json").write_text(json.dumps({"captions": ["one", "two"], "age": 3}))
    (tmp_path / "b.json").write_text("[1]")
    (tmp_path / "c.json").write_text("{")
    picture(tmp_path / "d.png")
    (tmp_path / "d.txt").write_text("d")
    loaded = load(tmp_path, format="pairs")
    assert loaded.samples[0].answers == ("one", "two")
    reasons = " ".join(reason for _, reason in loaded.bad)
    assert "holds a list" in reasons and "cannot be read" in reasons and "two files give the image" in reasons
    with pytest.raises(DataError, match="holds no pictures"):
        load(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")


def test_a_text_file_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "secret")
    picture(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "b.txt").write_text("fine")
    loaded = load(tmp_path / "in")
    assert [sample.id for sample in loaded.samples] == ["b"] and "leads outside" in loaded.bad[0][1]


def test_a_folder_with_metadata(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.wav").write_bytes(wav(TONE))
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.wav", "text": "b"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [sample.media[0].kind for sample in load(tmp_path).samples] == ["image", "audio"]


# ---------------------------------------------------------------- caption files


def test_flickr8k_in_both_spellings(tmp_path):
    for name in "ab":
        picture(tmp_path / "Flicker8k_Dataset" / f"{name}.jpg")
    token = "a.jpg#0\tA dog , running .\na.jpg#1\tA dog\nb.jpg#0\tA cat\nnonsense\nb.jpg#1\tOne cat\n"
    (tmp_path / "Flickr8k.token.txt").write_text(token)
    (tmp_path / "captions.txt").write_text('image,caption\na.jpg,"A dog , running ."\na.jpg,A dog\nb.jpg,A cat\n')
    loaded = load(tmp_path / "Flickr8k.token.txt")
    assert (loaded.format, loaded.layout) == ("pairs", "flickr8k")
    assert [sample.answers for sample in loaded.samples] == [("A dog , running .", "A dog"), ("A cat", "One cat")]
    assert loaded.samples[0].media[0].path == "Flicker8k_Dataset/a.jpg"
    assert loaded.samples[1].where.endswith("token.txt:3")
    assert [where.rsplit(":", 1)[1] for where, _ in loaded.bad] == ["4"]
    second = load(tmp_path / "captions.txt")
    assert [sample.answers for sample in second.samples] == [("A dog , running .", "A dog"), ("A cat",)]
    table = load(tmp_path / "captions.txt", wanted=("table",))
    assert table.samples[0].cells["captions"] == Cell("text", "A dog , running .\nA dog") and table.bad == []


def coco(tmp_path, **changes):
    for name in (139, 285, 632):
        picture(tmp_path / "val2017" / f"{name:012}.jpg")
    found = {
        "info": {},
        "images": [{"id": n, "file_name": f"{n:012}.jpg"} for n in (139, 285, 632)],
        "annotations": [
            {"id": 1, "image_id": 285, "caption": "a bear"},
            {"id": 2, "image_id": 139, "caption": "a room"},
            {"id": 3, "image_id": 285, "caption": "one bear"},
            {"id": 4, "image_id": 7, "caption": "nothing"},
            {"id": 5, "image_id": 139, "bbox": [1, 2, 3, 4]},
        ],
    } | changes
    (tmp_path / "annotations").mkdir(exist_ok=True)
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(found))
    return path


def test_coco_captions(tmp_path):
    path = coco(tmp_path)
    loaded = load(path)
    assert (loaded.format, loaded.layout) == ("pairs", "coco")
    assert {sample.id: sample.answers for sample in loaded.samples} == {
        "285": ("a bear", "one bear"),
        "139": ("a room",),
    }
    assert loaded.samples[0].media[0].path == "val2017/000000000285.jpg"
    assert [where for where, _ in loaded.bad] == [f"{path}: annotation 4", f"{path}: annotation 5"]
    for changes, text in [({"images": 3}, "`images` is a int"), ({"annotations": None}, "`annotations` is missing")]:
        with pytest.raises(DataError, match=text):
            load(coco(tmp_path, **changes))


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/passwd", "http://example.org/a.jpg"])
def test_a_caption_file_opens_nothing_outside(tmp_path, name):
    found = {"images": [{"id": 1, "file_name": name}, {"id": 139, "file_name": "000000000139.jpg"}]}
    rows = [{"image_id": 139, "caption": "in"}, {"image_id": 1, "caption": "out"}]
    loaded = load(coco(tmp_path, **found, annotations=rows))
    assert [sample.id for sample in loaded.samples] == ["139"] and "path" in loaded.bad[0][1]


def test_sounds_and_their_captions(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(wav(TONE))
    frame = pd.DataFrame({"file_name": ["a.wav", "b.wav"], "caption_1": ["rain", "wind"], "caption_2": ["drops", None]})
    frame.to_csv(tmp_path / "clotho.csv", index=False)
    loaded = load(tmp_path / "clotho.csv")
    assert loaded.format == "pairs" and [sample.answers for sample in loaded.samples] == [("rain", "drops"), ("wind",)]
    assert loaded.samples[0].media[0] == MediaRef("audio", path="a.wav", root=tmp_path)
    (tmp_path / "audiocaps.csv").write_text("audio,caption\na.wav,rain\ngone.wav,wind\n")
    loaded = load(tmp_path / "audiocaps.csv")
    assert len(loaded.samples) == 1 and "does not exist" in loaded.bad[0][1]


# ---------------------------------------------------------------- tables


def frame(folder) -> pd.DataFrame:
    picture(folder / "a.png")
    return pd.DataFrame(
        {
            "id": [f"p{k}" for k in range(6)],
            "note": ["a long day at sea", "so so", "a fine thing to have", "x y z w", "what a day it was", "no"],
            "photo": ["a.png"] * 5 + [None],
            "age": [1.5, None, 3, 4, 5, 6],
            "site": ["n", "s"] * 3,
            "y": [0, 1] * 3,
        }
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_the_same_samples_from_every_file_and_from_the_frame(tmp_path, suffix):
    rows = frame(tmp_path)
    path = tmp_path / f"rows.{suffix}"
    {"csv": rows.to_csv, "parquet": rows.to_parquet}.get(suffix, lambda *_, **__: None)(path, index=False)
    if suffix == "jsonl":
        rows.to_json(path, orient="records", lines=True)
    loaded = load(path, columns={"y": "label"})
    assert loaded.format == "table" and loaded.bad == []
    assert loaded.columns.kinds == {
        "id": "id", "note": "text", "photo": "image", "age": "numeric", "site": "categorical", "y": "label"
    }  # fmt: skip
    columns = infer_columns(rows.to_dict("records"), label="y")
    own = table_samples(rows, columns, root=tmp_path, name="rows")
    assert fingerprint(loaded.samples) == fingerprint(own)
    assert loaded.samples[1].cells["age"] == Cell("numeric", None) and loaded.samples[1].tags == {"site": "s"}
    changed = dataclasses.replace(own[0], cells={**own[0].cells, "age": Cell("numeric", 1.6)})
    assert fingerprint([changed, *own[1:]]) != fingerprint(own)


def test_evaluation_rows_have_the_columns_of_training(tmp_path):
    rows = frame(tmp_path)
    rows.to_csv(tmp_path / "train.csv", index=False)
    rows[:2].to_csv(tmp_path / "more.csv", index=False)
    train = [DataSource(path=str(tmp_path / f"{name}.csv"), columns={"y": "label"}) for name in ("train", "more")]
    first, second = load_many(train, DataSection(train=tuple(train)), 0)
    assert first.columns == second.columns and second.columns.kinds["site"] == "categorical"
    few = [DataSource(path=str(tmp_path / "more.csv"), format="table")]
    alone = load_many(few, DataSection(train=tuple(train)), 0)[0]
    assert alone.columns.kinds["site"] == "text"
    [held] = load_many(few, DataSection(train=tuple(train)), 0, columns=first.columns)
    assert held.samples[0].cells["site"].kind == "categorical"


def test_bad_rows_of_a_table_have_line_and_column(tmp_path):
    rows = frame(tmp_path).astype({"age": object})
    rows.loc[1, "age"] = "old"
    rows.loc[2, "age"] = "inf"
    rows.loc[3, "photo"] = "../a.png"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    loaded = load(tmp_path / "rows.csv", columns={"y": "label", "age": "numeric"})
    assert [where.rsplit(":", 1)[1] for where, _ in loaded.bad] == ["3", "4", "5"]
    assert [reason.split(" (")[0] for _, reason in loaded.bad][:2] == [
        "'old' is no finite number",
        "'inf' is no finite number",
    ]
    with pytest.raises(DataError, match="there is no column 'hight'[\\s\\S]*nearest: 'height'|no column 'hight'"):
        load(tmp_path / "rows.csv", columns={"y": "label", "hight": "numeric"})


def test_a_column_of_training_that_is_gone_is_named(tmp_path):
    rows = frame(tmp_path)
    columns = infer_columns(rows.to_dict("records"), label="y")
    assert len(table_samples(rows.drop(columns="y"), columns, root=tmp_path, labelled=False)) == 6
    with pytest.raises(DataError, match=r"no column 'y' \(label\)"):
        table_samples(rows.drop(columns="y"), columns, root=tmp_path)
    with pytest.raises(DataError, match=r"no column 'photo' \(image\)[\s\S]*nearest: 'foto'"):
        table_samples(rows.rename(columns={"photo": "foto"}), columns, root=tmp_path)
    with pytest.raises(DataError, match="2 columns are the label: site, y"):
        infer_columns(rows.to_dict("records"), label="y", declared={"site": "label"})


def test_media_of_every_kind_in_cells(tmp_path):
    rows = [
        {"clip": [Image.new("RGB", (2, 2), (k, 0, 0)) for k in range(3)], "shot": np.zeros((3, 4, 3), np.uint8), "y": k}
        for k in range(2)
    ]
    columns = infer_columns(rows, label="y")
    assert (columns.kinds["clip"], columns.kinds["shot"]) == ("video", "image")
    opened = open_sample(table_samples(rows, columns)[0])
    assert [frame.getpixel((0, 0))[0] for frame in opened["clip"]] == [0, 1, 2] and opened["shot"].size == (4, 3)
    (tmp_path / "bad.wav").write_bytes(wav(TONE)[:-100])
    columns = infer_columns([{"v": "bad.wav", "y": 1}], label="y")
    with pytest.raises(DataError, match="truncated[\\s\\S]*row 0, column v: .*bad.wav"):
        open_sample(table_samples([{"v": "bad.wav", "y": 1}], columns, root=tmp_path)[0])


# ---------------------------------------------------------------- conversations of other tools


def _talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def _data_uri(path) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_the_layouts_of_other_tools_say_the_same(tmp_path):
    import base64

    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "b.png", 2)
    (tmp_path / "s.wav").write_bytes(wav(TONE))
    uri, sound = _data_uri(tmp_path / "a.png"), base64.b64encode(wav(TONE)).decode()
    image = {"type": "image_url", "image_url": {"url": uri}}
    told = {"type": "text", "text": "What?"}
    rows = {
        "openai": {"messages": [{"role": "developer", "content": "Be kind."}, *_talk([image, told], "A cat")]},
        "openai sound": {
            "messages": _talk([{"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}, told], "Hm")
        },
        "sharegpt": {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat"}],
            "images": ["a.png"],
        },
        "qwen-vl": {
            "id": "identity_0",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nWhat?"},
                {"from": "assistant", "value": "A cat"},
            ],
        },
        "qwen2-vl": {"messages": _talk([{"image": "a.png"}, {"text": "What?"}], [{"text": "A cat"}])},
        "internvl": {
            "id": 0, "image": ["a.png", "b.png"], "width_list": [4, 4], "height_list": [3, 3],
            "conversations": [{"from": "human", "value": "<image>\n<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}],
        },
        "minicpm-v": {
            "id": "0", "image": {"<image_00>": "a.png", "<image_01>": "b.png"},
            "conversations": _talk("<image_00>\n<image_01>\nWhat?", "A cat"),
        },
        "minicpm-v, no mark": {"id": "1", "image": {"<image_00>": "a.png"}, "conversations": _talk("What?", "A cat")},
        "trl": {"prompt": _talk("What?"), "completion": _talk("", "A cat")[1:], "image": "a.png"},
        "trl texts": {"prompt": "What?", "completion": "A cat", "image": "a.png"},
        "swift": {"messages": _talk("<image><audio>What?", "A cat"), "images": ["a.png"], "audios": ["s.wav"]},
        "frames": {"messages": _talk("<video>What?", "A cat"), "videos": [["a.png", "b.png"]]},
        "plain": {"messages": _talk("What is <audio> in HTML?", "A tag")},
    }  # fmt: skip
    expected = {
        "openai": "system:Be kind. user:[image]What? assistant:A cat",
        "openai sound": "user:[audio]What? assistant:Hm",
        "sharegpt": "system:Be kind. user:[image]What? assistant:A cat",
        "qwen-vl": "user:[image][image]What? assistant:A cat",
        "qwen2-vl": "user:[image]What? assistant:A cat",
        "internvl": "user:[image][image]What? assistant:A cat",
        "minicpm-v": "user:[image][image]What? assistant:A cat",
        "minicpm-v, no mark": "user:[image]What? assistant:A cat",
        "trl": "user:[image]What? assistant:A cat",
        "trl texts": "user:[image]What? assistant:A cat",
        "swift": "user:[image][audio]What? assistant:A cat",
        "frames": "user:[video]What? assistant:A cat",
        "plain": "user:What is <audio> in HTML? assistant:A tag",
    }
    for name, row in rows.items():
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row))
        loaded = load(path)
        assert not loaded.bad, (name, loaded.bad)
        [sample] = loaded.samples
        found = " ".join(
            f"{turn.role}:" + "".join(one.text if one.kind == "text" else f"[{one.kind}]" for one in turn.pieces)
            for turn in sample.turns
        )
        assert found == expected[name], name
        kinds = [piece.kind for turn in sample.turns for piece in turn.pieces if piece.kind != "text"]
        assert [ref.kind for ref in sample.media] == kinds, name


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": _talk("<image>x", "y"), "images": ["http://example.org/a.png"]}, "is a URL"),
        ({"messages": _talk("<video>x", "y"), "videos": ["../clip"]}, "climbs out"),
        ({"messages": _talk("<audio>x", "y"), "audios": ["/etc/hostname"]}, "leads outside"),
        ({"conversations": _talk("Picture 1: <img>/etc/hostname</img>\nx", "y")}, "leads outside"),
        ({"messages": _talk([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}], "y")}, "base64"),
        ({"messages": _talk([{"type": "image", "image": "data:audio/wav;base64,AAAA"}], "y")}, "data: URI of audio"),
        ({"messages": _talk([{"type": "input_audio", "input_audio": {"data": "@"}}], "y")}, "base64"),
        ({"messages": _talk("x", "<image>y"), "images": ["a.png"]}, "a picture stands in a assistant turn"),
        ({"prompt": "x", "completion": 3}, "`completion` is a int"),
        ({"messages": _talk("<audio><audio>x", "y"), "audios": ["a.wav"]}, "2 audio placeholder"),
    ],
)
def test_hostile_and_broken_conversations(tmp_path, row, text):
    picture(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": _talk("a", "b")}))
    form = next(
        form
        for key, form in {"prompt": "prompt", "conversations": "llava", "": "messages"}.items()
        if key in {*row, ""}
    )
    assert text in load(tmp_path / "rows.jsonl", format=form).bad[0][1]


def test_a_datasets_folder_with_pictures_and_sounds(tmp_path):
    """Features that would be decoded on reading are read as bytes: the caps come before any decoding."""
    import datasets

    picture(tmp_path / "a.png", 3)
    held = {
        "image": [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}],
        "audio": [{"bytes": wav(TONE), "path": "s.wav"}],
        "note": ["a long text of a few words"],
        "label": ["x"],
    }
    made = datasets.Dataset.from_dict(held)
    made = made.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio(sampling_rate=16000))
    made.save_to_disk(str(tmp_path / "d"))
    loaded = load(tmp_path / "d", wanted=("table",))
    assert loaded.columns.kinds == {"image": "image", "audio": "audio", "note": "text", "label": "label"}
    opened = open_sample(loaded.samples[0])
    assert opened["image"].getpixel((0, 0)) == (3, 10, 20) and opened["audio"].shape == (800,)
