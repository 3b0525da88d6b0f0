"""Annotation files of the usual question sets as rows: `image`, `question`, `answer(s)`, `id`, `tags`.

VQAv2 and OK-VQA (a questions file with its annotations file beside it), GQA, TextVQA and ST-VQA, DocVQA and
InfographicVQA, ChartQA, ScienceQA. Each is told by its keys; pictures are looked for below the media root, in the
set's usual folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmft.data.objects import first_there, folder_of, listed, read_object
from mmft.data.readers import Read, Row, read_rows
from mmft.errors import DataError

_SPLITS = ("train", "val", "test")
Found = Iterator[tuple[str, Row | DataError]]


def looks_annotated(head: bytes) -> str | None:
    """Which of the sets a JSON file is by its first bytes; None for none."""
    if head[:1] == b"[":
        return "chartqa" if b'"imgname"' in head and b'"query"' in head else None
    if b'"questions"' in head and b'"question_id"' in head:
        return "vqav2"
    if b'"imageId"' in head and b'"question"' in head:
        return "gqa"
    if b'"docId"' in head or b'"ucsf_document_id"' in head or b'"image_local_name"' in head:
        return "docvqa"
    if b'"flickr_original_url"' in head or b'"image_classes"' in head or (b'"data"' in head and b'"image_id"' in head):
        return "textvqa"
    if b'"choices"' in head and b'"hint"' in head and b'"question"' in head:
        return "scienceqa"
    return None


def annotated(path: Path, form: str, root: Path) -> Read:
    """The rows of an annotation file. Raises DataError for one that is not of this set."""
    readers = {
        "vqav2": _vqav2, "gqa": _gqa, "docvqa": _docvqa, "textvqa": _textvqa, "scienceqa": _scienceqa,
        "chartqa": _chartqa,
    }  # fmt: skip
    return readers[form](path, root)


def _row(entry: Any, where: str, make: Any) -> tuple[str, Row | DataError]:
    """`make(entry)`, or a bad row naming the key that it lacks."""
    try:
        return where, {key: value for key, value in make(entry).items() if value is not None}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        return where, DataError(f"the entry has no usable {error}", where=where, do="mend the annotation file")


def _vqav2(path: Path, root: Path) -> Found:
    """`v2_OpenEnded_mscoco_train2014_questions.json` and, beside it, `v2_mscoco_train2014_annotations.json`."""
    found = read_object(path)
    name = path.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    beside = path.parent / name
    if not beside.is_file() or beside == path:
        raise DataError(
            "the answers are missing", where=str(beside), do="put the annotations file beside the questions"
        )
    answers = {entry.get("question_id"): entry for entry in listed(read_object(beside), "annotations", beside)}
    split = str(found.get("data_subtype") or next((one for one in ("train2014", "val2014") if one in path.name), ""))
    prefix: list[str] = []

    def make(entry: Mapping[str, Any]) -> Row:
        truth = answers[entry["question_id"]]
        image = f"COCO_{split}_{int(entry['image_id']):012}.jpg"
        if not prefix:
            prefix.append(folder_of(root, image))
        texts = [str(one["answer"]) for one in truth["answers"]]
        tags = {"type": truth.get("question_type"), "answer_type": truth.get("answer_type")}
        return {
            "id": str(entry["question_id"]), "image": prefix[0] + image, "question": str(entry["question"]),
            "answers": texts, "tags": tags,
        }  # fmt: skip

    for number, entry in enumerate(listed(found, "questions", path), start=1):
        yield _row(entry, f"{path}: question {number}", make)


def _gqa(path: Path, root: Path) -> Found:
    """`{id: {"imageId", "question", "answer", "types"}}`."""
    prefix: list[str] = []
    for number, (key, entry) in enumerate(read_object(path).items(), start=1):

        def make(one: Mapping[str, Any], key: str = key) -> Row:
            image = f"{one['imageId']}.jpg"
            if not prefix:
                prefix.append(folder_of(root, image))
            tags = {name: str(value) for name, value in (one.get("types") or {}).items() if value is not None}
            return {
                "id": key, "image": prefix[0] + image, "question": str(one["question"]), "answer": str(one["answer"]),
                "tags": tags,
            }  # fmt: skip

        yield _row(entry, f"{path}: question {number}", make)


def _textvqa(path: Path, root: Path) -> Found:
    """`{"data": [{"image_id", "question", "answers": [ten]}]}`; ST-VQA's `file_path` too."""
    prefix: list[str] = []

    def make(entry: Mapping[str, Any]) -> Row:
        image = str(entry.get("file_path") or f"{entry['image_id']}.jpg")
        if not prefix:
            prefix.append(folder_of(root, image))
        answers = [str(one) for one in entry["answers"]]
        return {
            "id": str(entry["question_id"]), "image": prefix[0] + image, "question": str(entry["question"]),
            "answers": answers,
        }  # fmt: skip

    for number, entry in enumerate(listed(read_object(path), "data", path), start=1):
        yield _row(entry, f"{path}: question {number}", make)


def _docvqa(path: Path, root: Path) -> Found:
    """`{"data": [{"questionId", "question", "image" or "image_local_name", "answers", "question_types"}]}`."""
    prefix: list[str] = []

    def make(entry: Mapping[str, Any]) -> Row:
        image = str(entry.get("image") or entry["image_local_name"])
        if not prefix:
            prefix.append(folder_of(root, image))
        types = entry.get("question_types")
        return {
            "id": str(entry["questionId"]), "image": prefix[0] + image, "question": str(entry["question"]),
            "answers": [str(one) for one in entry["answers"]],
            "tags": {"type": ", ".join(map(str, types))} if types else None,
        }  # fmt: skip

    for number, entry in enumerate(listed(read_object(path), "data", path), start=1):
        yield _row(entry, f"{path}: question {number}", make)


def _scienceqa(path: Path, root: Path) -> Found:
    """`problems.json`: `{id: {"question", "choices", "answer": index, "hint", "image", "split"}}`. The answer is the
    choice's letter, the question lists the choices; a row of another split than the file's folder names is left out."""
    wanted = next((one for one in _SPLITS if path.stem.endswith(one)), None)
    for key, entry in read_object(path).items():
        if wanted is not None and isinstance(entry, dict) and entry.get("split") not in (wanted, None):
            continue

        def make(one: Mapping[str, Any], key: str = key) -> Row:
            letters = [chr(ord("A") + at) for at in range(len(one["choices"]))]
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, one["choices"], strict=True))
            hint = f"{one['hint'].strip()}\n" if one.get("hint") else ""
            image = one.get("image")
            split = one.get("split") or ""
            if image:
                options = (f"{split}/{key}/{image}", f"images/{split}/{key}/{image}", f"{key}/{image}")
                image = first_there(root, options)
            tags = {name: str(one[name]) for name in ("subject", "grade", "topic") if one.get(name)}
            return {
                "id": key, "image": image or None, "question": f"{hint}{one['question']}\n{choices}",
                "answer": letters[one["answer"]], "tags": tags,
            }  # fmt: skip

        yield _row(entry, f"{path}: problem {key}", make)


def _chartqa(path: Path, root: Path) -> Found:
    """`[{"imgname", "query", "label"}]` with pictures in `png/` beside it."""
    for number, (where, entry) in enumerate(read_rows(path), start=1):
        if isinstance(entry, DataError):
            yield where, entry
            continue

        def make(one: Mapping[str, Any], number: int = number) -> Row:
            image = first_there(root, (f"png/{one['imgname']}", str(one["imgname"])))
            kind = "human" if "human" in path.name else "augmented" if "augmented" in path.name else None
            return {
                "id": f"{path.stem}-{number}", "image": image, "question": str(one["query"]),
                "answer": str(one["label"]), "tags": {"type": kind} if kind else None,
            }  # fmt: skip

        yield _row(entry, where, make)
