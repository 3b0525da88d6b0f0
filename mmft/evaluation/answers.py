"""`PredictionStore`: the questions, references and every model's answers, as rows of predictions.jsonl.

This file is the wall between generation and everything that is said about it: scores and report read nothing else.
A row: {"set", "id", "question", "references": [..], "tags": {..}, "images": [path, absolute or relative to the run
folder], "answers": {model: text}}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmft.data.media import media_file, media_name, read_bytes
from mmft.data.sample import MediaRef, Sample
from mmft.errors import CheckpointError, DataError
from mmft.files import sha256_bytes, write_bytes, write_text

Record = dict[str, Any]
_FIELDS = {"set": str, "id": str, "question": str, "references": list, "tags": dict, "images": list, "answers": dict}


class PredictionStore:
    """Records in evaluation order; `add` once per set and model, then `write`."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.records: list[Record] = list(records)
        self._places = {(record["set"], record["id"]): index for index, record in enumerate(self.records)}

    @property
    def models(self) -> tuple[str, ...]:
        """Models that answered, in the order they were added."""
        return tuple(dict.fromkeys(model for record in self.records for model in record["answers"]))

    def add(
        self, name: str, model: str, samples: Sequence[Sample], *, answers: Sequence[str], folder: Path | None = None
    ) -> None:
        """Record `answers` of `model` to `samples` of the set `name`.

        Pictures that exist only as bytes in a row are written to `folder`/pictures once; without a folder they are
        left out of the record. Raises DataError for a count mismatch, an id twice in a set, or a row without an answer
        to compare with.
        """
        if len(samples) != len(answers):
            raise DataError(
                f"{len(answers)} answers for {len(samples)} rows",
                where=f"set {name}, model {model}",
                do="report this: a model must answer every row",
            )
        seen: set[str] = set()
        for sample, answer in zip(samples, answers, strict=True):
            if sample.id in seen:
                raise DataError(
                    f"the id {sample.id!r} occurs twice in the evaluation set",
                    where=f"set {name}, {sample.where}",
                    do="give every row an id of its own",
                )
            seen.add(sample.id)
            self._record(name, sample, folder)["answers"][model] = answer

    def _record(self, name: str, sample: Sample, folder: Path | None) -> Record:
        place = self._places.get((name, sample.id))
        if place is not None:
            return self.records[place]
        if not sample.references:
            raise DataError(
                "an evaluation row has no answer to compare with",
                where=f"set {name}, {sample.where or sample.id}",
                do="end the row with an assistant turn, or give it `answers`",
            )
        record: Record = {
            "set": name,
            "id": sample.id,
            "question": sample.question.strip(),
            "references": list(sample.references),
            "tags": dict(sample.tags),
            "images": [
                image for ref in sample.media if ref.kind == "image" and (image := _image_path(ref, folder)) is not None
            ],
            "answers": {},
        }
        self._places[(name, sample.id)] = len(self.records)
        self.records.append(record)
        return record

    def write(self, path: Path) -> None:
        """Write all records, atomically."""
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records))

    @classmethod
    def read(cls, path: Path) -> PredictionStore:
        """Records of a predictions.jsonl. Raises CheckpointError naming the line that is not a record."""
        if not path.is_file():
            raise CheckpointError(
                "there are no predictions here", where=str(path), do="run `mmft evaluate` on the run folder first"
            )
        records = []
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    records.append(_checked(line, where=f"{path}:{number}"))
        return cls(records)


def _checked(line: str, *, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=where, do="run `mmft evaluate` again") from error
    wrong = [
        name for name, kind in _FIELDS.items() if not isinstance(record, dict) or not isinstance(record.get(name), kind)
    ]
    if wrong:
        raise CheckpointError(
            f"not a prediction record: {', '.join(wrong)} missing or of a wrong type",
            where=where,
            allowed=", ".join(f"{name}: {kind.__name__}" for name, kind in _FIELDS.items()),
            do="run `mmft evaluate` again",
        )
    return record


def _image_path(ref: MediaRef, folder: Path | None) -> str | None:
    """Where the report will find the picture."""
    if ref.path is not None and ref.span is None:
        return os.path.abspath(media_file(ref) if ref.root is not None else media_name(ref))
    if folder is None:
        return None
    data = read_bytes(ref)
    name = f"pictures/{sha256_bytes(data)[:20]}"
    if not (folder / name).exists():
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, data)
    return name
