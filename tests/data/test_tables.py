"""Tables of mixed columns: what is inferred, what is opened, which labels are refused."""

from __future__ import annotations

import io
import math
import wave

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mmft.data.table_rows import class_labels, open_row
from mmft.data.tables import infer_columns, is_missing, load_table
from mmft.errors import DataError

SENTENCES = ["it was a long and happy day", "nothing here worked at all", "so so", "a fine thing to have"]


def wav(samples: np.ndarray, *, rate: int = 16000, width: int = 2) -> bytes:
    """PCM of (N, channels) in [-1, 1); written with numpy's own casts."""
    whole = np.round(samples * (1 << (8 * width - 1))).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    raw = b"".join(int(x).to_bytes(width, "little", signed=width > 1) for x in whole.ravel())
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (5, 4), (200, 10, 10)).save(tmp_path / "a.png")
    tone = np.sin(np.arange(800) / 5)[:, None] * 0.5
    (tmp_path / "a.wav").write_bytes(wav(tone))
    (tmp_path / "silent.wav").write_bytes(wav(np.zeros((800, 1))))
    (tmp_path / "empty.wav").write_bytes(wav(np.zeros((0, 1))))
    return tmp_path


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "review text": SENTENCES * 2,
            "photo": ["a.png"] * 7 + [None],
            "voice": ["a.wav", None] * 4,
            "age": [3, 4, None, 6, 7, 8, 9, 10],
            "site": ["north", "south"] * 4,
            "smoker": [True, False] * 4,
            "nothing": [None] * 8,
            "y": ["good", "bad", "bad", "good"] * 2,
        }
    )


def test_what_is_inferred_and_opened(folder):
    rows = load_table(frame())
    columns = infer_columns(rows, label="y")
    assert columns.kinds == {
        "review text": "text",
        "photo": "image",
        "voice": "audio",
        "age": "numeric",
        "site": "categorical",
        "smoker": "categorical",
        "nothing": "ignored",
        "y": "label",
    }
    assert columns.modalities == {
        "review_text": ("review text",),
        "photo": ("photo",),
        "voice": ("voice",),
        "table": ("age", "site", "smoker"),
    }
    assert columns.table().splitlines()[4] == "site         categorical  2 different values in 8 cells"
    row = open_row(rows[0], columns, where="row 0", root=folder)
    assert row["review_text"] == SENTENCES[0]
    assert (row["photo"].size, row["photo"].mode) == ((5, 4), "RGB")
    expected = np.round(np.sin(np.arange(800) / 5) * 0.5 * 32768) / 32768
    np.testing.assert_array_equal(row["voice"], expected.astype(np.float32))
    assert row["table"] == {"age": 3.0, "site": "north", "smoker": "True"}
    last = open_row(rows[7], columns, where="row 7", root=folder)
    assert last["photo"] is None and last["voice"] is None
    assert open_row(rows[2], columns, where="row 2", root=folder)["table"]["age"] is None
    assert open_row({}, columns, where="row 9")["table"] is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_are_read_as_the_frame_is(folder, suffix):
    path = folder / f"rows{suffix}"
    frame().to_csv(path, index=False) if suffix == ".csv" else frame().to_parquet(path)
    rows = load_table(path)
    columns = infer_columns(rows, label="y", declared={"smoker": "categorical"})
    assert columns.kinds == infer_columns(load_table(frame()), label="y").kinds
    first = open_row(rows[0], columns, where="row 0", root=folder)
    assert first["table"]["age"] == 3.0
    assert class_labels(rows, "y") == (("bad", "good"), [1, 0, 0, 1, 1, 0, 0, 1])


def test_declared_kinds_win_and_are_checked():
    rows = [{"a": 1, "b": "x", "y": 0}, {"a": 2, "b": "y", "y": 1}]
    found = infer_columns(rows, label="y", declared={"a": "categorical", "b": "text"})
    assert (found.kinds["a"], found.kinds["b"], found.reasons["a"]) == ("categorical", "text", "declared")
    with pytest.raises(DataError, match="no column 'bb'[\\s\\S]*nearest: 'b'"):
        infer_columns(rows, label="y", declared={"bb": "text"})
    with pytest.raises(DataError, match="'picture' is no kind of column"):
        infer_columns(rows, label="y", declared={"b": "picture"})
    with pytest.raises(DataError, match="no column 'label'"):
        infer_columns(rows, label="label")
    with pytest.raises(DataError, match="cells of kinds int, str stand in one column[\\s\\S]*column a"):
        infer_columns([{"a": 1, "y": 0}, {"a": "cat", "y": 1}], label="y")
    with pytest.raises(DataError, match="two modalities called 'a_b'"):
        infer_columns([{"a b": "x", "a-b": "y", "y": 0}], label="y", declared={"a b": "text", "a-b": "text"})
    for source, text in [([], "without rows"), (3, "no table"), ("missing.csv", "no data file")]:
        with pytest.raises(DataError, match=text):
            load_table(source)


def test_bytes_and_arrays_in_cells():
    picture = io.BytesIO()
    Image.new("L", (3, 2), 7).save(picture, "PNG")
    sound = {"array": [0.5, -0.5], "sampling_rate": 16000}
    rows = [{"p": {"bytes": picture.getvalue(), "path": None}, "s": sound, "q": Image.new("RGB", (2, 2)), "y": 0}]
    columns = infer_columns(rows, label="y")
    assert (columns.kinds["p"], columns.kinds["s"], columns.kinds["q"]) == ("image", "audio", "image")
    row = open_row(rows[0], columns, where="row 0")
    assert (row["p"].size, row["s"].tolist()) == ((3, 2), [0.5, -0.5])


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("silent.wav", "the sound is silent[\\s\\S]*row 4, column v"),
        ("empty.wav", "the sound has no samples"),
        ("a.png", "no PCM WAV|cannot be read"),
        ("../a.wav", "path"),
        ("gone.wav", "gone.wav"),
        ({"array": [0.1, math.nan], "sampling_rate": 16000}, "NaN or infinite"),
        ({"array": [], "sampling_rate": 16000}, r"a sound of shape \(0,\)"),
        ({"array": [0.1]}, "samples without a rate"),
    ],
)
def test_bad_sounds_are_named(folder, cell, text):
    columns = infer_columns([{"v": "a.wav", "y": 0}], label="y")
    with pytest.raises(DataError, match=text):
        open_row({"v": cell}, columns, where="row 4", root=folder)


def test_bad_cells_are_named(folder):
    columns = infer_columns([{"n": 1.5, "p": "a.png", "y": 0}], label="y")
    for row, text in [
        ({"n": "old"}, "'old' is no finite number[\\s\\S]*row 3, column n"),
        ({"n": math.inf}, "inf is no"),
    ]:
        with pytest.raises(DataError, match=text):
            open_row(row, columns, where="row 3", root=folder)
    with pytest.raises(DataError, match="an image is a int"):
        open_row({"p": 3}, columns, where="row 3", root=folder)


def test_labels():
    rows = [{"y": value} for value in (10, 9.0, "10", 2)]
    assert class_labels(rows, "y") == (("2", "9", "10"), [2, 1, 2, 0])
    assert class_labels(rows, "y", classes=[10, 9, 2]) == (("10", "9", "2"), [0, 1, 0, 2])
    with pytest.raises(DataError, match="the label is empty[\\s\\S]*row 1, column y"):
        class_labels([{"y": "a"}, {"y": math.nan}], "y")
    with pytest.raises(
        DataError, match="label 'godo' is not in the declared set[\\s\\S]*row 1[\\s\\S]*nearest: 'good'"
    ):
        class_labels([{"y": "good"}, {"y": "godo"}], "y", classes=["good", "bad"])
    with pytest.raises(DataError, match=r"class\(es\) bad never occur in training"):
        class_labels([{"y": "good"}, {"y": "good"}], "y", classes=["good", "bad"])
    assert class_labels([{"y": "good"}], "y", classes=["good", "bad"], training=False)[1] == [0]
    with pytest.raises(DataError, match="there is one class, 'good'"):
        class_labels([{"y": "good"}], "y")


def test_what_is_missing():
    assert all(is_missing(cell) for cell in (None, math.nan, np.float32("nan"), pd.NA, pd.NaT, "", "  "))
    assert not any(is_missing(cell) for cell in (0, 0.0, False, "0", "nan", [], {}))
