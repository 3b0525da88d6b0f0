"""Annotation files of the usual question sets, and tar shards: every set in its own form, small."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from mmft.data.audit import fingerprint
from mmft.data.formats import load_samples
from mmft.data.media import media_digest, open_image
from mmft.errors import DataError
from mmft.recipe.schema import DataSource
from tests.data.small import encoded
from tests.data.small import picture as noise
from tests.data.test_layouts import picture


def load(path, **options):
    return load_samples(DataSource(path=str(path), **options), seed=0)


def written(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def vqav2(root):
    picture(root / "train2014" / "COCO_train2014_000000458752.jpg")
    answers = [
        {"answer": word, "answer_confidence": "yes", "answer_id": at} for at, word in enumerate(["net"] * 9 + ["a net"])
    ]
    one = {
        "image_id": 458752,
        "question_id": 458752000,
        "question_type": "what is",
        "answer_type": "other",
        "answers": answers,
    }
    written(root / "v2_mscoco_train2014_annotations.json", {"info": {}, "annotations": [one]})
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "No answer?", "question_id": 1},
    ]
    head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "train2014"}
    return written(root / "v2_OpenEnded_mscoco_train2014_questions.json", head | {"questions": questions})


def gqa(root):
    picture(root / "images" / "2354786.jpg")
    types = {"detailed": "categoryThat", "semantic": "cat", "structural": "query"}
    one = {"semantic": [], "imageId": "2354786", "question": "What is it?", "answer": "a cat", "types": types}
    return written(
        root / "val_balanced_questions.json", {"05515938": one, "2": {"imageId": "2354786", "question": "x"}}
    )


def textvqa(root):
    picture(root / "train_images" / "0054c91397f2fe05.jpg")
    one = {
        "question": "what is the brand?", "image_id": "0054c91397f2fe05", "image_classes": ["Camera"],
        "flickr_original_url": "https://example.org/a.jpg", "question_id": 0, "answers": ["nous les gosses"] * 10,
        "set_name": "train",
    }  # fmt: skip
    bad = one | {"question_id": 1, "image_id": "../secret"}
    return written(root / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": [one, bad]})


def docvqa(root):
    picture(root / "documents" / "xnbl0037_1.png")
    one = {
        "questionId": 337, "question": "what is the date?", "question_types": ["handwritten", "form"],
        "image": "documents/xnbl0037_1.png", "docId": 279, "answers": ["1/8/93"], "data_split": "train",
    }  # fmt: skip
    bad = {key: value for key, value in one.items() if key != "answers"}
    return written(root / "train_v1.0.json", {"dataset_name": "SP-DocVQA", "data": [one, bad]})


def chartqa(root):
    picture(root / "png" / "41699051005347.png")
    rows = [{"imgname": "41699051005347.png", "query": "How many bars?", "label": "14"}, {"imgname": "x.png"}]
    return written(root / "train_human.json", rows)


def scienceqa(root):
    picture(root / "train" / "1" / "image.png")
    one = {
        "question": "Which is farthest north?", "choices": ["Ohio", "Maine"], "answer": 1, "hint": "Look at the map.",
        "image": "image.png", "split": "train", "subject": "social science", "grade": "grade2",
    }  # fmt: skip
    return written(root / "problems.json", {"1": one, "2": one | {"image": None}, "3": one | {"answer": 7}})


EXPECTED = {
    vqav2: ("What is this photo taken looking through?", "net", {"type": "what is", "answer_type": "other"}),
    gqa: ("What is it?", "a cat", {"detailed": "categoryThat", "semantic": "cat", "structural": "query"}),
    textvqa: ("what is the brand?", "nous les gosses", {}),
    docvqa: ("what is the date?", "1/8/93", {"type": "handwritten, form"}),
    chartqa: ("How many bars?", "14", {"type": "human"}),
    scienceqa: (
        "Look at the map.\nWhich is farthest north?\nA. Ohio\nB. Maine", "B",
        {"subject": "social science", "grade": "grade2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_question_sets(tmp_path, make):
    question, answer, tags = EXPECTED[make]
    path = make(tmp_path)
    loaded = load(path)
    assert (loaded.format, loaded.layout) == ("qa", make.__name__)
    first = loaded.samples[0]
    assert (first.question, first.turns[-1].text, dict(first.tags)) == (question, answer, tags)
    assert open_image(first.media[0], max_pixels=100).size == (4, 3)
    assert len(loaded.bad) == 1 and str(path) in loaded.bad[0][0]
    if make is vqav2:
        assert first.answers == ("net",) * 9 + ("a net",)
    if make is scienceqa:
        assert loaded.samples[1].media == ()
    other = load(path, format=make.__name__, media_root=str(tmp_path))
    assert fingerprint(other.samples) == fingerprint(loaded.samples)


def test_a_questions_file_without_its_answers(tmp_path):
    path = vqav2(tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match="the answers are missing[\\s\\S]*v2_mscoco_train2014_annotations.json"):
        load(path)


# ---------------------------------------------------------------- shards


def shard(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
                file.addfile(info)
            else:
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_shards_are_rows_without_being_read_into_memory(tmp_path):
    png = [encoded(noise(k)) for k in range(4)]
    shard(tmp_path / "a-0001.tar", [("s/2.jpg", png[2]), ("s/2.txt", b"two\n")])
    shard(
        tmp_path / "a-0000.tar",
        [
            ("0.png", png[0]),
            ("0.json", b'{"caption": "zero", "image": "elsewhere.png"}'),
            ("0.bin", b"?"),
            ("1.txt", b"one"),
            ("1.png", png[1]),
        ],
    )
    loaded = load(tmp_path)
    assert (loaded.format, loaded.layout, loaded.bad) == ("pairs", "webdataset", [])
    assert [sample.id for sample in loaded.samples] == ["0", "1", "s/2"]
    assert [sample.answers for sample in loaded.samples] == [("zero",), ("one",), ("two",)]
    assert all(sample.media[0].data is None for sample in loaded.samples)
    assert open_image(loaded.samples[2].media[0], max_pixels=10**6).tobytes() == noise(2).tobytes()
    import hashlib

    assert media_digest(loaded.samples[1].media[0]) == hashlib.sha256(png[1]).hexdigest()
    assert loaded.samples[2].where == f"{tmp_path / 'a-0001.tar'}:1"
    assert len(load(tmp_path / "a-0000.tar").samples) == 2


def test_several_pictures_and_conversations_in_a_shard(tmp_path):
    talk = {"messages": [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "both"}]}
    members = [("k.0.png", encoded(noise(0))), ("k.1.png", encoded(noise(1))), ("k.json", json.dumps(talk).encode())]
    [sample] = load(shard(tmp_path / "a.tar", members)).samples
    assert [open_image(ref, max_pixels=10**6).tobytes() for ref in sample.media] == [noise(k).tobytes() for k in (0, 1)]


def test_hostile_and_broken_shards(tmp_path):
    png = encoded(noise(0))
    members = [
        ("a.png", None), ("a.txt", b"a link"),
        ("b.png", png), ("b.txt", b"\xff\xfe"),
        ("c.png", png), ("c.jpg", png), ("c.txt", b"two pictures"),
        ("d.png", png), ("d.json", b"[1]"),
        ("../../e.png", png), ("../../e.txt", b"a name is a name"),
    ]  # fmt: skip
    loaded = load(shard(tmp_path / "a.tar", members), format="webdataset")
    reasons = [reason for _, reason in loaded.bad]
    assert [
        "link" in reasons[0],
        "cannot be read" in reasons[1],
        "two members" in reasons[2],
        "a list" in reasons[3],
    ] == [True] * 4
    assert [sample.id for sample in loaded.samples] == ["../../e"] and list(tmp_path.iterdir()) == [tmp_path / "a.tar"]
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:700])
    (tmp_path / "no.tar").write_bytes(b"hello" * 1000)
    for name in ("cut.tar", "no.tar"):
        with pytest.raises(DataError, match="broken tar file|no rows|none of the first"):
            load(tmp_path / name)
