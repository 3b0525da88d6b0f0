"""Rows become samples; every bad row is found with its line and a reason."""

from __future__ import annotations

import base64
import csv
import json
import os
from pathlib import Path

import pytest

from mmft.data.formats import load_all, load_many, load_samples
from mmft.data.media import open_image
from mmft.data.readers import read_rows
from mmft.errors import DataError
from mmft.recipe.schema import DataSection, DataSource
from tests.data.small import encoded, picture, write


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def good(number: int = 0, **changes) -> dict:
    row = {
        "id": f"row-{number}",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"cat {number}"}]},
        ],
    }
    return row | changes


def load(path: Path, **options):
    return load_samples(DataSource(path=str(path), **options), seed=0)


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        write(tmp_path, name, picture())
    return tmp_path


def chat(*turns: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


BAD = {
    "broken JSON": ('{"id": ', "broken JSON"),
    "a list": ("[1, 2]", "the row is a list"),
    "missing messages": ({"id": "x"}, "`messages` is missing"),
    "empty messages": (good(messages=[]), "`messages` is empty"),
    "messages a text": (good(messages="hi"), "`messages` is a str"),
    "unknown role": (good(images=[], messages=chat(("usr", "a"), ("assistant", "b"))), "nearest: 'user'"),
    "content a number": (good(images=[], messages=chat(("user", 3), ("assistant", "b"))), "content` is a int"),
    "unknown piece": (good(messages=chat(("user", [{"type": "smell"}]), ("assistant", "b"))), "type 'smell'"),
    "two users": (good(images=[], messages=chat(("user", "a"), ("user", "a"), ("assistant", "b"))), "turn 2 is user"),
    "assistant first": (good(images=[], messages=chat(("assistant", "b"))), "turn 1 is assistant"),
    "no answer": (good(images=[], messages=chat(("user", "a"))), "last turn is not the assistant's"),
    "late system": (good(images=[], messages=chat(("user", "a"), ("system", "s"), ("assistant", "b"))), "is system"),
    "empty answer": (good(images=[], messages=chat(("user", "a"), ("assistant", " \n"))), "an answer is empty"),
    "empty question": (good(images=[], messages=chat(("user", ""), ("assistant", "b"))), "user turn is empty"),
    "too few images": (good(images=[]), "1 image placeholder(s) but 0 image(s)"),
    "too many images": (good(images=["a.png", "b.png"]), "1 image placeholder(s) but 2 image(s)"),
    "picture in an answer": (good(messages=chat(("user", "a"), ("assistant", "b <image>"))), "in a assistant turn"),
    "missing file": (good(images=["none.png"]), "does not exist"),
    "escape": (good(images=["../a.png"]), "'..'"),
    "absolute": (good(images=["/etc/passwd"]), "outside"),
    "url": (good(images=["https://example.org/a.png"]), "URL"),
    "fifo": (good(images=["pipe.png"]), "not a regular file"),
    "link out": (good(images=["link.png"]), "outside"),
    "NUL": (good(images=["a\0.png"]), "NUL"),
    "empty file": (good(images=["empty.png"]), "empty (0 bytes)"),
    "image a number": (good(images=[3]), "an image is a int"),
    "broken base64": (good(images=["data:image/png;base64,@@"]), "base64"),
    "surrogate": (json.dumps(good(images=[], messages=chat(("user", "\ud800"), ("assistant", "b")))), "surrogate"),
    "a megabyte": (good(images=[], messages=chat(("user", "a" * 1_000_001), ("assistant", "b"))), "1000002 characters"),
    "id a list": (good(id=[1]), "the id is a list"),
    "duplicate id": (good(0), "id 'row-0' was given before, at "),
    "tags a text": (good(tags="x"), "`tags` is a str"),
    "answers a mess": (good(answers=[None]), "an answer is missing"),
}


def test_every_bad_row_is_found_with_its_line(root):
    os.mkfifo(root / "pipe.png")
    (root / "link.png").symlink_to("/etc/hostname")
    (root / "empty.png").touch()
    rows, expected = [good(0)], []
    for number, (name, (row, reason)) in enumerate(BAD.items(), start=1):
        if isinstance(row, dict) and row.get("id") == "row-0" and name != "duplicate id":
            row = row | {"id": f"bad-{number}"}
        rows += [row, good(number)]
        expected.append((f"{root / 'rows.jsonl'}:{2 * number}", reason))
    loaded = load(lines(root / "rows.jsonl", rows))
    assert loaded.format == "messages"
    assert [sample.id for sample in loaded.samples] == [f"row-{number}" for number in range(len(BAD) + 1)]
    assert [where for where, _ in loaded.bad] == [where for where, _ in expected]
    for (_, found), (_, reason) in zip(loaded.bad, expected, strict=True):
        assert reason in found


def test_not_utf8(root):
    path = root / "rows.jsonl"
    path.write_bytes(json.dumps(good()).encode() + b'\n{"id": "\xff"}\n')
    loaded = load(path)
    assert loaded.bad == [(f"{path}:2", "not UTF-8: byte 8 is 0xff")]


def test_the_budget_of_bad_rows(root):
    path = lines(root / "rows.jsonl", [good(number) for number in range(90)] + ["{"] * 10)
    source = DataSource(path=str(path))
    assert len(load_all([source], DataSection(train=(source,), max_bad_fraction=0.1), 0)) == 90
    with pytest.raises(DataError) as caught:
        load_all([source], DataSection(train=(source,), max_bad_fraction=0.099), 0)
    text = str(caught.value)
    assert "10 of 100 rows of 'rows' are bad" in text and "data.max_bad_fraction" in text
    assert [f"{path}:{line}" in text for line in range(91, 97)] == [True] * 5 + [False]
    with pytest.raises(DataError, match="1 of 1 rows"):
        load_all([DataSource(path=str(lines(root / "one.jsonl", [{"messages": 1}])))], DataSection(train=(source,)), 0)


def test_all_bad_is_never_within_the_budget(root):
    source = DataSource(path=str(lines(root / "rows.jsonl", [{"messages": []}])))
    with pytest.raises(DataError, match="1 of 1"):
        load_many([source], DataSection(train=(source,), max_bad_fraction=1.0), 0)


def test_the_dialects_agree(root):
    talk = [("What is it?", "a cat"), ("Where?", "left")]
    pieces = chat(
        ("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
        ("assistant", "a cat"),
        ("user", "Where?"),
        ("assistant", [{"type": "text", "text": "left"}]),
    )
    plain = chat(("user", "<image>\nWhat is it?"), ("assistant", "a cat"), ("user", "Where?"), ("assistant", "left"))
    inline = json.loads(json.dumps(pieces))
    inline[0]["content"][0] = {"type": "image_url", "image_url": {"url": "a.png"}}
    second = json.loads(json.dumps(pieces))
    second[0]["content"][0] = {"type": "image", "image": "a.png"}
    llava = [
        {"from": who, "value": text}
        for k, pair in enumerate(talk)
        for who, text in (("human", ("<image>\n" if k == 0 else "") + pair[0]), ("gpt", pair[1]))
    ]
    rows = {
        "pieces": {"messages": pieces, "images": ["a.png"]},
        "plain": {"messages": plain, "images": ["a.png"]},
        "inline": {"messages": inline},
        "second": {"messages": second},
        "llava": {"conversations": llava, "image": "a.png"},
        "list": {"conversations": llava, "image": ["a.png"]},
    }
    found = {name: load(lines(root / f"{name}.jsonl", [row])) for name, row in rows.items()}
    assert all(not one.bad for one in found.values())
    assert {name: one.format for name, one in found.items()}["llava"] == "llava"
    turns = {name: one.samples[0].turns for name, one in found.items()}
    assert all(value == turns["pieces"] for value in turns.values())
    assert {one.samples[0].media[0].path for one in found.values()} == {"a.png"}
    assert [piece.kind for piece in turns["pieces"][0].pieces] == ["image", "text"]


def test_a_mark_behind_the_text(root):
    row = {"messages": chat(("user", "What is it?\n<image>"), ("assistant", "a cat")), "images": ["a.png"]}
    (sample,) = load(lines(root / "rows.jsonl", [row])).samples
    assert [(piece.kind, piece.text) for piece in sample.turns[0].pieces] == [("text", "What is it?"), ("image", "")]


def test_qa_rows(root):
    rows = [
        {"image": "a.png", "question": "What?", "answers": ["dog", "cat", "cat"], "tags": {"type": "what", "n": 3}},
        {"image": "a.png", "question": "How many?", "answer": 3, "id": 17},
        {"question": "No picture?", "answer": "no"},
        {"image": "a.png", "question": "First?", "answer": ["x", "y"]},
        {"image": "a.png", "question": "VQA?", "answers": [{"answer": "u"}, {"answer": "v"}, {"answer": "v"}]},
        {"image": "a.png", "question": "Look <image> there?", "answer": "ok"},
        {"image": "a.png", "question": None, "answer": "ok"},
        {"image": "a.png", "question": "q", "answers": []},
    ]
    loaded = load(lines(root / "vqa.jsonl", rows))
    assert loaded.format == "qa" and loaded.name == "vqa"
    one, two, three, four, five, six = loaded.samples
    assert (one.turns[-1].text, one.references, one.id) == ("cat", ("dog", "cat", "cat"), "vqa-1")
    assert dict(one.tags) == {"type": "what", "n": "3"} and one.question == "What?"
    assert (two.turns[-1].text, two.references, two.id) == ("3", ("3",), "17")
    assert three.media == () and four.turns[-1].text == "x" and five.turns[-1].text == "v"
    assert [piece.kind for piece in six.turns[0].pieces] == ["text", "image", "text"]
    assert [(where.rsplit(":", 1)[1], reason) for where, reason in loaded.bad] == [
        ("7", "the question is missing (allowed: a text)"),
        ("8", "the list of answers is empty"),
    ]


def test_columns(root):
    rows = [{"pic": "a.png", "q": "What?", "a": "cat"}]
    path = lines(root / "rows.jsonl", rows)
    with pytest.raises(DataError, match="keys are a, pic, q") as caught:
        load(path)
    assert "data.train[].columns" in str(caught.value)
    (sample,) = load(path, columns={"image": "pic", "question": "q", "answer": "a"}).samples
    assert (sample.question, sample.turns[-1].text, len(sample.media)) == ("What?", "cat", 1)


def test_every_file_kind_gives_the_same_samples(root):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"image": "a.png", "question": f"What {k}?", "answer": f"cat {k}"} for k in range(5)]
    (root / "x.json").write_text(json.dumps(rows, indent=1))
    lines(root / "x.jsonl", rows)
    (root / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (root / "x.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n"))
    with (root / "x.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), root / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "folder"))
    texts = [[turn.text for turn in sample.turns] for sample in load(root / "x.jsonl").samples]
    assert texts[3] == ["What 3?", "cat 3"]
    for name in ("x.json", "bom.jsonl", "x.csv", "x.parquet", "folder"):
        loaded = load(root / name, media_root=str(root))
        assert not loaded.bad, loaded.bad
        assert [[turn.text for turn in sample.turns] for sample in loaded.samples] == texts, name


def test_encoded_pictures_in_rows(root):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = picture(3)
    data = encoded(image)
    row = {"question": "What?", "answer": "cat"}
    pq.write_table(pa.Table.from_pylist([row | {"image": {"bytes": data, "path": None}}]), root / "x.parquet")
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    datasets.Dataset.from_dict({k: [v] for k, v in (row | {"image": image}).items()}, features=features).save_to_disk(
        str(root / "folder")
    )
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    lines(root / "x.jsonl", [row | {"image": url}])
    for name in ("x.parquet", "folder", "x.jsonl"):
        (sample,) = load(root / name).samples
        assert open_image(sample.media[0], max_pixels=10**6).tobytes() == image.tobytes(), name


def test_num_samples_is_a_choice_by_seed_and_name(root):
    path = lines(root / "rows.jsonl", [good(number) for number in range(50)])

    def chosen(seed: int, **options) -> list[str]:
        source = DataSource(path=str(path), num_samples=10, **options)
        return [sample.id for sample in load_samples(source, seed=seed).samples]

    first = chosen(0)
    assert len(first) == 10 and first == sorted(first, key=lambda name: int(name.split("-")[1]))
    assert first == chosen(0) and first != chosen(1) and first != chosen(0, name="other")
    assert len(load(path, num_samples=500).samples) == 50


def test_the_system_turn(root):
    own = good(1, messages=[{"role": "system", "content": "Mine."}, *good(1)["messages"]])
    source = DataSource(path=str(lines(root / "rows.jsonl", [good(0), own])))
    samples = load_samples(source, seed=0, system="Be kind.").samples
    assert [sample.turns[0].text for sample in samples] == ["Be kind.", "Mine."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "has no rows"),
        ("x.json", '{"a": 1}', "does not start with"),
        ("x.json", '[{"a": 1}\n {"a": 2}]', "',' or ']' expected"),
        ("x.json", '[{"a": 1},\n {"a": ]', "broken JSON"),
        ("x.txt", "hello", "no data file that is read here"),
        ("x.parquet", "hello", "broken parquet"),
        ("x.csv", 'a,b\n"x', "broken CSV"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_a_file_of_broken_lines_only(root):
    path = lines(root / "rows.jsonl", ["{"] * 30)
    with pytest.raises(DataError, match="none of the first 20 rows can be read") as caught:
        load(path)
    assert f"{path}:5" in str(caught.value) and "broken JSON, column 2" in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match="nearest: 'train.jsonl'"):
        load(tmp_path / "trian.jsonl")


def test_lines_of_a_json_list(tmp_path):
    (tmp_path / "x.json").write_text('[\n {"a": 1},\n\n {"a":\n 2}, 3]')
    found = list(read_rows(tmp_path / "x.json"))
    assert [where.rsplit(":", 1)[1] for where, _ in found] == ["2", "4", "5"]
    assert isinstance(found[2][1], DataError)


def test_deep_json_is_a_bad_row(root):
    path = lines(root / "rows.jsonl", [good(), "[" * 100_000])
    assert [where for where, _ in load(path).bad] == [f"{path}:2"]


def test_csv_rows_of_another_width(tmp_path):
    (tmp_path / "x.csv").write_text('question,answer\n"a\nb",c\nd\ne,f,g\nh,i\n')
    loaded = load(tmp_path / "x.csv")
    assert [sample.question for sample in loaded.samples] == ["a\nb", "h"]
    assert [where.rsplit(":", 1)[1] for where, _ in loaded.bad] == ["4", "5"]


def test_a_folder_of_splits_is_refused(tmp_path):
    import datasets

    one = datasets.Dataset.from_list([{"question": "q", "answer": "a"}])
    datasets.DatasetDict({"train": one}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="several splits"):
        load(tmp_path / "d")
