"""The columns of tables (CSV, Parquet, JSON lines, a DataFrame, a list of dicts): which kind each of them is.

Every column is an image, a sound, a video, a text, a number, a category, the label or the row's id; what is not
declared is inferred, and `Columns.table()` shows what was found. Text, image, audio and video columns are modalities of
their own, numbers and categories are one modality, `table`. An empty cell (None, NaN, "") is a missing value, an error
only in the label. `table_rows.py` makes rows of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mmft.data.layouts import open_source
from mmft.data.media import kind_of_bytes, kind_of_name
from mmft.data.sample import MediaRef
from mmft.errors import DataError, choices

KINDS = ("text", "image", "audio", "video", "numeric", "categorical", "label", "id", "tag", "ignored")
MODALITIES = ("text", "image", "audio", "video")
TABLE, ID, LABEL = "table", "id", "label"
_MOST_CATEGORIES, _CATEGORY_SHARE, _CATEGORY_WORDS = 50, 0.5, 3


@dataclass(frozen=True)
class Columns:
    """column -> kind, why it is thought so, modality name -> its columns (several for `table`), and the label's column
    ("" for none)."""

    kinds: dict[str, str]
    reasons: dict[str, str]
    modalities: dict[str, tuple[str, ...]]
    label: str

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Columns of a kind in the data's order."""
        return tuple(name for name, found in self.kinds.items() if found == kind)

    def table(self) -> str:
        """The inference, one line per column: name, kind, reason."""
        width = max(map(len, self.kinds))
        return "\n".join(f"{name:<{width}}  {kind:<11}  {self.reasons[name]}" for name, kind in self.kinds.items())


def load_table(source: Any) -> list[dict[str, Any]]:
    """Rows of a file or folder (`layouts.open_source`), a DataFrame or a sequence of dicts. Raises DataError for
    anything else, a broken line, or no rows."""
    rows: list[Any]
    if isinstance(source, str | Path):
        rows = []
        for _, row in open_source(Path(source)).rows:
            if isinstance(row, DataError):
                raise row
            rows.append(row)
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):
        rows = source.to_dict("records")
    else:
        rows = list(source) if isinstance(source, Sequence) and not isinstance(source, bytes) else [source]
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(
            "no table" if rows else "a table without rows",
            where=str(source) if isinstance(source, str | Path) else type(source).__name__,
            allowed="a .csv, .parquet or .jsonl file, a folder, a pandas DataFrame, a list of dicts",
            do="give a table with at least one row",
        )
    return [dict(row) for row in rows]


def infer_columns(
    rows: Sequence[Mapping[str, Any]], *, label: str | None = None, declared: Mapping[str, str] | None = None
) -> Columns:
    """The kind of every column of training rows: as `declared`, else by what its cells hold:

    pictures, or paths that all end like pictures: image; likewise audio and video, and lists of pictures: video;
    lists of texts: text; numbers (or texts that all read as numbers): numeric; truth values: categorical; texts:
    categorical when at most 50 different ones come in at most half as many kinds as cells and none has more than 3
    words, else text; nothing at all: ignored. A `tag`, which must be declared, names groups of rows in reports and is
    no input. A column `id` whose cells all differ names the rows. Without `label`, a
    column declared as one or called `label` is it. Raises DataError for unknown columns or kinds, mixed or unknown
    cells, two labels, and two columns of one modality name.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    declared = {**(declared or {}), **({label: LABEL} if label is not None else {})}
    if LABEL not in declared.values() and LABEL in names and LABEL not in declared:
        declared[LABEL] = LABEL
    for name, kind in declared.items():
        if name not in names:
            raise DataError(f"there is no column '{name}'", allowed=choices(names, word=name), do="mend the name")
        if kind not in KINDS:
            raise DataError(
                f"'{kind}' is no kind of column", where=name, allowed=choices(KINDS, word=kind), do="mend it"
            )
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name in names:
        if name in declared:
            kinds[name], reasons[name] = declared[name], "declared" if name != LABEL else "the label"
        else:
            kinds[name], reasons[name] = _infer(name, [row.get(name) for row in rows])
    for kind in (LABEL, ID):
        found = [name for name in names if kinds[name] == kind]
        if len(found) > 1:
            raise DataError(f"{len(found)} columns are the {kind}: {', '.join(found)}", do="declare one of them")
    named = next((name for name in names if kinds[name] == LABEL), "")
    return Columns(kinds, reasons, _modalities(kinds), named)


def modality_name(column: str) -> str:
    """A column's modality: its name as an identifier, which model and processor call it by."""
    name = re.sub(r"\W+", "_", column).strip("_")
    return name if name.isidentifier() else f"column_{name}"


def _modalities(kinds: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    modalities: dict[str, tuple[str, ...]] = {}
    for name, kind in kinds.items():
        if kind in MODALITIES:
            modality = modality_name(name)
            if modality in modalities or modality == TABLE:
                raise DataError(
                    f"the columns give two modalities called '{modality}'", where=name, do="rename one of the columns"
                )
            modalities[modality] = (name,)
    tabular = tuple(name for name, kind in kinds.items() if kind in ("numeric", "categorical"))
    return modalities | ({TABLE: tabular} if tabular else {})


def _infer(name: str, cells: Sequence[Any]) -> tuple[str, str]:
    there = [cell for cell in cells if not is_missing(cell)]
    if not there:
        return "ignored", "every cell is empty"
    if name == ID and len(set(map(str, there))) == len(cells):
        return ID, "names the rows"
    found = {_cell(cell) for cell in there}
    if found == {"words"}:
        return _infer_words([str(cell) for cell in there])
    if found == {"number"}:
        return "numeric", f"{len(there)} numbers"
    if len(found) == 1 and (kind := found.pop()) != "unknown":
        return ("categorical", "truth values") if kind == "truth" else (kind, f"{len(there)} cells that hold them")
    raise DataError(
        f"cells of kinds {', '.join(sorted({type(cell).__name__ for cell in there}))} stand in one column",
        where=f"column {name}",
        allowed="texts, numbers, truth values, pictures, sounds, videos, paths of them",
        do="clean the column, or declare it 'ignored'",
    )


def _cell(cell: Any) -> str:
    if isinstance(cell, str):
        return "words"
    if isinstance(cell, bool | np.bool_):
        return "truth"
    if isinstance(cell, Real):
        return "number"
    if hasattr(cell, "convert") and hasattr(cell, "size"):
        return "image"
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8 and cell.ndim in (2, 3):
        return "image"
    if isinstance(cell, Mapping) and cell.get("array") is not None:
        return "audio"
    if isinstance(cell, Mapping):
        name = kind_of_name(cell["path"]) if isinstance(cell.get("path"), str) else None
        return name or (_cell(cell["bytes"]) if isinstance(cell.get("bytes"), bytes) else "unknown")
    if isinstance(cell, bytes):
        return kind_of_bytes(cell) or "unknown"
    if isinstance(cell, MediaRef):
        return cell.kind
    if isinstance(cell, list | tuple) and cell:
        frames = {kind_of_name(one) if isinstance(one, str) else _cell(one) for one in cell}
        return "video" if frames == {"image"} else "text" if all(isinstance(one, str) for one in cell) else "unknown"
    return "unknown"


def _infer_words(cells: Sequence[str]) -> tuple[str, str]:
    kinds = {kind_of_name(cell) for cell in cells}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind, f"{len(cells)} paths of {kind} files"
    if all(as_float(cell) is not None for cell in cells):
        return "numeric", f"{len(cells)} texts that read as numbers"
    different, longest = len(set(cells)), max(len(cell.split()) for cell in cells)
    few = different <= min(_MOST_CATEGORIES, _CATEGORY_SHARE * len(cells))
    if few and longest <= _CATEGORY_WORDS:
        return "categorical", f"{different} different values in {len(cells)} cells"
    return "text", f"{different} different values of up to {longest} words"


def is_missing(cell: Any) -> bool:
    """True for None, NaN, pandas' NA and NaT, and text of nothing but spaces."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(cell, str):
        return not cell.strip()
    return isinstance(cell, Real) and math.isnan(cell)


def as_float(cell: Any) -> float | None:
    """A cell that reads as a number; None for any other (truth values too)."""
    try:
        return None if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None
