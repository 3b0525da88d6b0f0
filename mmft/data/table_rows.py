"""Rows of tables become `Sample`s, and a `Sample` of a table becomes what a fusion model's processor takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from mmft.data.dialects import MAX_CHARS, RowContext
from mmft.data.media import open_image
from mmft.data.references import media_reference
from mmft.data.sample import Cell, MediaKind, MediaRef, Sample
from mmft.data.sounds import MAX_SECONDS, open_audio
from mmft.data.tables import MODALITIES, TABLE, Columns, as_float, is_missing, load_table, modality_name
from mmft.data.videos import open_video
from mmft.errors import DataError, MmftError, Problem, choices

_MEDIA: dict[str, MediaKind] = {"image": "image", "audio": "audio", "video": "video"}


def parse_table(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """One row as a `Sample` without turns: every column of `context.columns` (name -> kind) as a `Cell`, the media of
    the row in their order, categories as tags too; a `tag` is a tag alone, which no model sees. A list of texts is one
    text, a line for each; a list of labels is one label, `|` between them.

    Categories and labels are texts (3.0, which pandas makes of 3 beside an empty cell, is 3); NaN, None and empty texts
    are missing. Raises DataError with the column for a cell of the wrong kind, an infinite number, a medium that is not
    there or out of its root.
    """
    cells: dict[str, Cell] = {}
    tags: dict[str, str] = {}
    given: Any = None
    for name, kind in context.columns.items():
        cell = row.get(name)
        if kind == "id":
            given = None if is_missing(cell) else _word(cell)
        elif kind == "tag":
            tags |= {} if is_missing(cell) else {name: _word(cell)}
        elif kind != "ignored":
            value = None if is_missing(cell) else _value(cell, kind, context.root, f"{where}, column {name}")
            cells[name] = Cell(kind, value)  # type: ignore[arg-type]
    return Sample(
        id=f"{context.name}-{number}" if given is None else given,
        turns=(),
        media=tuple(cell.value for cell in cells.values() if isinstance(cell.value, MediaRef)),
        cells=cells,
        tags=tags
        | {name: str(cell.value) for name, cell in cells.items() if cell.kind == "categorical" and cell.value},
        source=context.name,
        where=where,
    )


def _value(cell: Any, kind: str, root: Path, where: str) -> str | float | MediaRef:
    if kind in _MEDIA:
        return media_reference(cell, root, where, _MEDIA[kind])
    if kind == "numeric":
        number = as_float(cell)
        if number is None or not math.isfinite(number):
            raise DataError(
                f"{cell!r} is no finite number", where=where, do="mend it, or declare the column categorical"
            )
        return number
    if kind == "text":
        text = "\n".join(map(str, cell)) if isinstance(cell, list | tuple) else str(cell)
        if len(text) > MAX_CHARS:
            raise DataError(f"a text has {len(text)} characters", where=where, allowed=f"at most {MAX_CHARS}")
        return text
    if kind == "label" and isinstance(cell, list | tuple):
        return "|".join(map(_word, cell)) or "|"
    if not isinstance(cell, str | Real):
        raise DataError(f"a {type(cell).__name__} stands in a {kind} column", where=where, allowed="a text or a number")
    return _word(cell)


def _word(value: Any) -> str:
    number = isinstance(value, Real) and not isinstance(value, bool)
    return str(int(value)) if number and float(value).is_integer() else str(value).strip()  # type: ignore[call-overload]


def table_samples(
    source: Any, columns: Columns, *, root: Path | None = None, name: str = "table", labelled: bool = True
) -> list[Sample]:
    """The samples of a file, a DataFrame or a list of dicts with the columns of the training rows; media lie below
    `root` (a file's own folder, else the working folder).

    Raises DataError for a column that is missing (the label only if `labelled`; a modality that a row lacks is an
    empty cell) and with its row and column for a bad cell.
    """
    rows = load_table(source)
    there = list(dict.fromkeys(column for row in rows for column in row))
    for column, kind in columns.kinds.items():
        if column not in there and kind not in ("ignored", "id", "tag") and (labelled or kind != "label"):
            raise DataError(
                f"there is no column '{column}' ({kind})",
                where=str(source) if isinstance(source, str | Path) else type(source).__name__,
                allowed=choices(there, word=column),
                do="name it as in training; leave its cells empty where there is none",
            )
    if root is None and isinstance(source, str | Path):
        root = Path(source) if Path(source).is_dir() else Path(source).parent
    root = root or Path.cwd()
    context = RowContext(name=name, root=root, columns=columns.kinds, system=None)
    return [parse_table(row, f"row {at}", at, context) for at, row in enumerate(rows)]


def columns_of(samples: Sequence[Sample]) -> Columns:
    """The columns that samples of a table were read with."""
    kinds: dict[str, str] = {name: cell.kind for name, cell in samples[0].cells.items()}
    modalities: dict[str, tuple[str, ...]] = {
        modality_name(name): (name,) for name, kind in kinds.items() if kind in MODALITIES
    }
    tabular = tuple(name for name, kind in kinds.items() if kind in ("numeric", "categorical"))
    label = next((name for name, kind in kinds.items() if kind == "label"), "")
    return Columns(kinds, dict.fromkeys(kinds, ""), modalities | ({TABLE: tabular} if tabular else {}), label)


def open_sample(
    sample: Sample,
    *,
    sampling_rate: int = 16000,
    frames: int = 8,
    max_image_pixels: int = 40_000_000,
    max_seconds: float = MAX_SECONDS,
) -> dict[str, Any]:
    """What `FusionProcessor` takes: modality -> text, picture (RGB), mono samples at `sampling_rate`, up to `frames`
    pictures of a video, or a dict of columns; None for a missing one.

    Raises DataError with row and column for a medium that is broken, silent, too large or too long.
    """
    out: dict[str, Any] = {}
    table: dict[str, Any] = {}
    for name, cell in sample.cells.items():
        value = cell.value
        if cell.kind in ("numeric", "categorical"):
            table[name] = value
            continue
        if cell.kind not in MODALITIES:
            continue
        try:
            if not isinstance(value, MediaRef):
                out[modality_name(name)] = value
            elif cell.kind == "image":
                out[modality_name(name)] = open_image(value, max_pixels=max_image_pixels)
            elif cell.kind == "audio":
                out[modality_name(name)] = open_audio(value, sampling_rate=sampling_rate, max_seconds=max_seconds)
            else:
                out[modality_name(name)] = open_video(
                    value, count=frames, max_pixels=max_image_pixels, max_seconds=max_seconds
                )
        except MmftError as error:
            row = f"{sample.where or sample.id}, column {name}"
            raise DataError(
                Problem(one.what, f"{row}: {one.where}" if one.where else row, one.allowed, one.do)
                for one in error.problems
            ) from error
    if table:
        out[TABLE] = None if all(value is None for value in table.values()) else table
    return out


def modality_columns(sample: Sample) -> dict[str, str]:
    """Modality name -> its column, of the modalities that are columns of their own."""
    return {modality_name(name): name for name, cell in sample.cells.items() if cell.kind in MODALITIES}


def label_of(sample: Sample) -> str:
    """The row's label as text. Raises DataError where it is empty or the rows have none."""
    name, cell = next(((name, cell) for name, cell in sample.cells.items() if cell.kind == "label"), (None, None))
    if cell is None or cell.value is None:
        raise DataError(
            "the label is empty" if cell else "no column is the label",
            where=f"{sample.where or sample.id}, column {name}" if cell else sample.where or sample.id,
            do="fill it in, or leave the row out" if cell else "declare the label's column",
        )
    return str(cell.value)


def sample_classes(
    samples: Sequence[Sample], *, classes: Sequence[Any] | None = None, training: bool = True
) -> tuple[tuple[str, ...], list[int]]:
    """The classes as text, and each row's number. `classes`: the declared set in its order (it makes the order of
    ordinal labels); otherwise the values of these rows, sorted (numbers by size).

    Raises DataError with the row for an empty label and one outside of the declared set, and in training for a declared
    class that never occurs and for fewer than two classes.
    """
    found = [label_of(sample) for sample in samples]
    known = tuple(map(_word, classes)) if classes is not None else tuple(sorted(set(found), key=_by_size))
    column = columns_of(samples).label
    for sample, word in zip(samples, found, strict=True):
        if word not in known:
            raise DataError(
                f"the label '{word}' is not in the declared set",
                where=f"{sample.where or sample.id}, column {column}",
                allowed=choices(known, word=word),
                do="mend the label, or declare it",
            )
    absent = [word for word in known if word not in set(found)]
    if training and (absent or len(known) < 2):
        raise DataError(
            f"the class(es) {', '.join(absent)} never occur in training"
            if absent
            else f"there is one class, '{known[0]}'",
            where=f"column {column}",
            allowed="at least two classes, each with a training row",
            do="add rows, or drop the class from the declared set",
        )
    place = {word: at for at, word in enumerate(known)}
    return known, [place[word] for word in found]


def _by_size(word: str) -> tuple[bool, float, str]:
    number = as_float(word)
    usable = number is not None and math.isfinite(number)
    return (not usable, number if usable and number is not None else 0.0, word)


def open_row(
    row: Mapping[str, Any],
    columns: Columns,
    *,
    where: str,
    root: Path | None = None,
    sampling_rate: int = 16000,
    max_image_pixels: int = 40_000_000,
) -> dict[str, Any]:
    """`open_sample` of the modalities of one row that is not a `Sample` yet; media lie below `root`, else the working
    folder."""
    kinds = {name: columns.kinds[name] for names in columns.modalities.values() for name in names}
    context = RowContext(name="row", root=root or Path.cwd(), columns=kinds, system=None)
    sample = parse_table(row, where, 0, context)
    return open_sample(sample, sampling_rate=sampling_rate, max_image_pixels=max_image_pixels)


def class_labels(
    rows: Sequence[Mapping[str, Any]], label: str, *, classes: Sequence[Any] | None = None, training: bool = True
) -> tuple[tuple[str, ...], list[int]]:
    """`sample_classes` of rows that are not `Sample`s yet."""
    context = RowContext(name="row", root=Path.cwd(), columns={label: "label"}, system=None)
    samples = [parse_table(row, f"row {at}", at, context) for at, row in enumerate(rows)]
    return sample_classes(samples, classes=classes, training=training)
