"""Tables of mixed columns (CSV, Parquet, JSON lines, a DataFrame, a list of dicts) become rows for a fusion model.

Every column is an image, a sound, a text, a number, a category or the label; what is not declared is inferred, and
`Columns.table()` shows what was found. Text, image and audio columns are modalities of their own, numbers and
categories are one modality, `table`. An empty cell (None, NaN, "") is a missing value, an error only in the label.
"""

from __future__ import annotations

import io
import math
import re
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mmft.data.media import open_image, read_bytes
from mmft.data.readers import read_rows
from mmft.data.sample import MediaRef
from mmft.errors import DataError, choices

KINDS = ("text", "image", "audio", "numeric", "categorical", "label", "ignored")
TABLE = "table"
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
_MOST_CATEGORIES, _CATEGORY_SHARE, _CATEGORY_WORDS = 50, 0.5, 3
_SILENCE = 1e-5
"""Loudest sample of a sound that counts as silent: below half a step of 16 bits."""


@dataclass(frozen=True)
class Columns:
    """column -> kind, why it is thought so, and modality name -> its columns (several for `table`)."""

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
    """Rows of a file (by its ending), a DataFrame or a sequence of dicts. Raises DataError for anything else, a broken
    line, or no rows."""
    rows: list[Any]
    if isinstance(source, str | Path):
        rows = []
        for _, row in read_rows(Path(source)):
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
            allowed="a .csv, .parquet or .jsonl file, a pandas DataFrame, a list of dicts",
            do="give a table with at least one row",
        )
    return [dict(row) for row in rows]


def infer_columns(
    rows: Sequence[Mapping[str, Any]], *, label: str, declared: Mapping[str, str] | None = None
) -> Columns:
    """The kind of every column of training rows: as `declared`, else by what its cells hold:

    pictures, or paths that all end like pictures: image; likewise audio; numbers (or texts that all read as
    numbers): numeric; truth values: categorical; texts: categorical when at most 50 different ones come in at most half
    as many kinds as cells and none has more than 3 words, else text; nothing at all: ignored.
    Raises DataError for unknown columns or kinds, mixed or unknown cells, and two columns of one modality name.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    declared = {**(declared or {}), label: "label"}
    for name, kind in declared.items():
        if name not in names:
            raise DataError(f"there is no column '{name}'", allowed=choices(names, word=name), do="mend the name")
        if kind not in KINDS:
            raise DataError(
                f"'{kind}' is no kind of column", where=name, allowed=choices(KINDS, word=kind), do="mend it"
            )
    kinds, reasons = {}, {}
    for name in names:
        if name in declared:
            kinds[name], reasons[name] = declared[name], "declared"
        else:
            kinds[name], reasons[name] = _infer(name, [row.get(name) for row in rows])
    modalities: dict[str, tuple[str, ...]] = {}
    for name, kind in kinds.items():
        if kind in ("text", "image", "audio"):
            modality = re.sub(r"\W+", "_", name).strip("_")
            modality = modality if modality.isidentifier() else f"column_{modality}"
            if modality in modalities or modality == TABLE:
                raise DataError(
                    f"the columns give two modalities called '{modality}'", where=name, do="rename one of the columns"
                )
            modalities[modality] = (name,)
    tabular = tuple(name for name, kind in kinds.items() if kind in ("numeric", "categorical"))
    return Columns(kinds, reasons, modalities | ({TABLE: tabular} if tabular else {}), label)


def _infer(name: str, cells: Sequence[Any]) -> tuple[str, str]:
    there = [cell for cell in cells if not is_missing(cell)]
    if not there:
        return "ignored", "every cell is empty"
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
        allowed="texts, numbers, truth values, pictures, sounds, paths of them",
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
    if isinstance(cell, Mapping) and "array" in cell:
        return "audio"
    if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
        return "audio" if str(cell.get("path") or "").lower().endswith(_SOUNDS) else "image"
    return "unknown"


def _infer_words(cells: Sequence[str]) -> tuple[str, str]:
    for kind, suffixes in (("image", _IMAGES), ("audio", _SOUNDS)):
        if all(cell.lower().endswith(suffixes) for cell in cells):
            return kind, f"{len(cells)} paths of {kind} files"
    if all(_number(cell) is not None for cell in cells):
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


def open_row(
    row: Mapping[str, Any],
    columns: Columns,
    *,
    where: str,
    root: Path | None = None,
    sampling_rate: int = 16000,
    max_image_pixels: int = 64_000_000,
) -> dict[str, Any]:
    """What `FusionProcessor` takes: modality -> text, picture (RGB), samples at `sampling_rate`, or a dict of columns;
    None for a missing one. Files lie below `root`.

    Raises DataError with `where` and the column for a cell of the wrong kind, a broken file, a path out of `root`, and
    a sound that is empty, silent or not finite (leave the cell empty to say that there is none).
    """
    out: dict[str, Any] = {}
    for modality, names in columns.modalities.items():
        if modality == TABLE:
            cells = {name: _tabular(row.get(name), columns.kinds[name], f"{where}, column {name}") for name in names}
            out[TABLE] = None if all(cell is None for cell in cells.values()) else cells
            continue
        cell, place = row.get(names[0]), f"{where}, column {names[0]}"
        kind = columns.kinds[names[0]]
        if is_missing(cell):
            out[modality] = None
        elif kind == "text":
            out[modality] = str(cell)
        elif kind == "image":
            opened = hasattr(cell, "convert")
            out[modality] = cell if opened else open_image(_ref(cell, root, place), max_pixels=max_image_pixels)
        else:
            out[modality] = open_sound(cell, root=root, where=place, sampling_rate=sampling_rate)
    return out


def _tabular(cell: Any, kind: str, where: str) -> Any:
    if is_missing(cell):
        return None
    if kind == "categorical":
        return cell
    number = _number(cell)
    if number is None or not math.isfinite(number):
        raise DataError(f"{cell!r} is no finite number", where=where, do="mend it, or declare the column categorical")
    return number


def _number(cell: Any) -> float | None:
    try:
        return None if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        return None


def _ref(cell: Any, root: Path | None, where: str) -> MediaRef:
    if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
        return MediaRef(data=cell["bytes"])
    if not isinstance(cell, str):
        raise DataError(f"{type(cell).__name__} is no path and no file", where=where, do="give a path below the root")
    return MediaRef(path=cell, root=root or Path.cwd())


def open_sound(cell: Any, *, root: Path | None, where: str, sampling_rate: int) -> np.ndarray:
    """Mono float32 samples at `sampling_rate` of `{"array", "sampling_rate"}`, of samples at that rate, or of a WAV
    file (other formats need the extra `audio`). Channels are averaged, other rates resampled by Fourier (exact
    below the lower half rate, for a sound taken as periodic). Raises DataError for what is broken, empty, silent or
    not finite."""
    if isinstance(cell, Mapping) and "array" in cell:
        samples, rate = np.asarray(cell["array"], dtype=np.float64), int(cell.get("sampling_rate") or sampling_rate)
    elif isinstance(cell, str | Mapping):
        samples, rate = _decode(read_bytes(_ref(cell, root, where)), where)
    else:
        samples, rate = np.asarray(cell, dtype=np.float64), sampling_rate
    if samples.size == 0 or samples.ndim > 2:
        raise DataError(f"a sound of shape {samples.shape}", where=where, do="give samples, or leave the cell empty")
    if samples.ndim == 2:
        samples = samples.mean(axis=1 if samples.shape[1] <= 8 else 0)
    if not np.isfinite(samples).all():
        raise DataError("the sound holds NaN or infinite samples", where=where, do="mend the file or the row")
    if np.abs(samples).max() < _SILENCE:
        raise DataError("the sound is silent", where=where, do="leave the cell empty, or give the real recording")
    if rate != sampling_rate:
        length = max(1, round(len(samples) * sampling_rate / rate))
        kept = np.fft.rfft(samples)[: length // 2 + 1]
        samples = np.fft.irfft(kept, length) * (length / len(samples))
    return samples.astype(np.float32)


def _decode(data: bytes, where: str) -> tuple[np.ndarray, int]:
    """Samples (N, channels) in [-1, 1] and the rate."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
        raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width).astype(np.int64)
        values = sum(raw[:, at] << (8 * at) for at in range(width)) if len(raw) else np.zeros(0, dtype=np.int64)
        half = 1 << (8 * width - 1)
        # Eight bits are unsigned, wider ones two's complement.
        values = values - half if width == 1 else (values + half) % (2 * half) - half
        return (values / half).reshape(-1, channels), rate
    except (wave.Error, EOFError) as error:
        try:
            import soundfile
        except ImportError:
            raise DataError(
                f"the sound is no PCM WAV file that can be read here: {error}",
                where=where,
                allowed="PCM WAV; FLAC, OGG and MP3 with the extra 'audio'",
                do="pip install 'mmft[audio]', or convert the file",
            ) from error
        try:
            return soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)
        except soundfile.LibsndfileError as broken:
            raise DataError(f"the sound cannot be read: {broken}", where=where, do="replace the file") from broken


def class_labels(
    rows: Sequence[Mapping[str, Any]], label: str, *, classes: Sequence[Any] | None = None, training: bool = True
) -> tuple[tuple[str, ...], list[int]]:
    """The classes as text, and each row's number. `classes`: the declared set in its order (it makes the order of
    ordinal labels); otherwise the values of these rows, sorted (numbers by size).

    Raises DataError with the row for an empty label and one outside of the declared set, and in training for a declared
    class that never occurs and for fewer than two classes.
    """
    found = []
    for index, row in enumerate(rows):
        if is_missing(row.get(label)):
            raise DataError(
                "the label is empty", where=f"row {index}, column {label}", do="fill it in, or leave the row out"
            )
        found.append(_word(row[label]))
    known = tuple(_word(one) for one in classes) if classes is not None else tuple(sorted(set(found), key=_by_size))
    for index, word in enumerate(found):
        if word not in known:
            raise DataError(
                f"the label '{word}' is not in the declared set",
                where=f"row {index}, column {label}",
                allowed=choices(known, word=word),
                do="mend the label, or declare it",
            )
    absent = [word for word in known if word not in set(found)]
    if training and (absent or len(known) < 2):
        raise DataError(
            f"the class(es) {', '.join(absent)} never occur in training"
            if absent
            else f"there is one class, '{known[0]}'",
            where=f"column {label}",
            allowed="at least two classes, each with a training row",
            do="add rows, or drop the class from the declared set",
        )
    place = {word: at for at, word in enumerate(known)}
    return known, [place[word] for word in found]


def _word(value: Any) -> str:
    """A label as text: 3.0, which pandas makes of 3 beside an empty cell, is 3."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return str(int(value)) if number and float(value).is_integer() else str(value).strip()


def _by_size(word: str) -> tuple[bool, float, str]:
    number = _number(word)
    usable = number is not None and math.isfinite(number)
    return (not usable, number if usable and number is not None else 0.0, word)
