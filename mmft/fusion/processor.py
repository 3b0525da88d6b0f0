"""Rows -> the inputs of a `FusionModel`: one tokenizer, image processor or feature extractor per modality, and a table.

A row is a dict: modality name -> value, None or absent where the row lacks it. Text: str. Image: a PIL picture or an
array that the image processor takes. Video: a sequence of pictures. Audio: samples (mono) at the extractor's rate, or
`{"array": ..., "sampling_rate": ...}`. Table: a dict of columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer
from transformers.utils import cached_file

from mmft.errors import BackboneError, DataError, choices
from mmft.fusion.config import KINDS, TABLE
from mmft.fusion.features import scatter_rows
from mmft.fusion.tabular import TableSchema

_FILE = "processor_config.json"
_LOADERS: dict[str, Any] = {
    "text": AutoTokenizer,
    "image": AutoImageProcessor,
    "video": AutoImageProcessor,
    "audio": AutoFeatureExtractor,
}


class FusionProcessor:
    """Processor of a fusion model; saved as `processor_config.json` and one folder per modality.

    parts: modality name -> (kind, tokenizer / image processor / feature extractor); table: the schema of the training
    rows; max_length: tokens of a text (the tokenizer's own limit otherwise); max_frames: of a video, evenly spaced;
    task and classes: what the labels of rows mean, as in `FusionConfig`.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[str, Any]],
        table: TableSchema | None = None,
        *,
        max_length: int | None = None,
        max_frames: int = 8,
        task: str = "single_label",
        classes: Sequence[str] = (),
    ) -> None:
        for name, (kind, _) in parts.items():
            if kind not in KINDS:
                raise DataError(
                    f"'{kind}' is no kind of modality",
                    where=name,
                    allowed=choices(KINDS, word=kind),
                    do="mend the kind",
                )
        self.parts, self.table = dict(parts), table
        self.max_length, self.max_frames = max_length, max_frames
        self.task, self.classes = task, tuple(classes)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in the model's order."""
        return (*self.parts, *((TABLE,) if self.table is not None else ()))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """`{"modalities": ..., "present": ...}` for `FusionModel`; the former without a modality that no row has.

        Raises DataError with row and modality for a value of the wrong type, an empty or non-finite sound, a video
        without frames, an unknown name, and for no rows at all. Silence is a sound like any other.
        """
        if not rows:
            raise DataError("a batch without rows", do="give at least one row")
        for index, row in enumerate(rows):
            for name in row:
                if name not in self.modalities:
                    allowed = choices(self.modalities, word=str(name))
                    raise DataError(
                        f"no modality is called '{name}'", where=f"row {index}", allowed=allowed, do="rename it"
                    )
        present = {name: torch.tensor([row.get(name) is not None for row in rows]) for name in self.modalities}
        modalities: dict[str, dict[str, Tensor]] = {}
        for name, (kind, part) in self.parts.items():
            where = [index for index, row in enumerate(rows) if row.get(name) is not None]
            if where:
                values = [_READERS[kind](rows[index][name], f"row {index}, {name}") for index in where]
                found = getattr(self, f"_{kind}")(part, values)
                at = torch.tensor(where)
                modalities[name] = {key: scatter_rows(value, at, len(rows)) for key, value in found.items()}
        if self.table is not None and bool(present[TABLE].any()):
            modalities[TABLE] = self.table.encode([row.get(TABLE) for row in rows])
        return {"modalities": modalities, "present": present}

    def _text(self, part: Any, values: list[str]) -> dict[str, Tensor]:
        found = part(values, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in found}

    def _image(self, part: Any, values: list[Any]) -> dict[str, Tensor]:
        return {"pixel_values": part(values, return_tensors="pt")["pixel_values"]}

    def _video(self, part: Any, values: list[list[Any]]) -> dict[str, Tensor]:
        chosen = [[video[at] for at in _spread(len(video), self.max_frames)] for video in values]
        pixels = self._image(part, [frame for video in chosen for frame in video])["pixel_values"]
        mask = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.bool)
        for index, video in enumerate(chosen):
            mask[index, : len(video)] = True
        out = pixels.new_zeros(*mask.shape, *pixels.shape[1:])
        out[mask] = pixels
        return {"pixel_values": out, "frame_mask": mask}

    def _audio(self, part: Any, values: list[tuple[np.ndarray, int | None]]) -> dict[str, Tensor]:
        rate = int(part.sampling_rate)
        for index, (_, given) in enumerate(values):
            if given is not None and given != rate:
                raise DataError(
                    f"a sound has {given} samples per second", where=f"sound {index} of the batch", allowed=str(rate),
                    do="resample it (datasets' Audio(sampling_rate=...) does it)",
                )  # fmt: skip
        sounds = [sound for sound, _ in values]
        longest = getattr(part, "nb_max_samples", None)
        if longest is not None:  # CLAP's extractor would cut long sounds at a random place
            found = part([sound[:longest] for sound in sounds], sampling_rate=rate, return_tensors="pt")
            longer = [len(sound) > longest for sound in sounds]
            return {"input_features": found["input_features"], "is_longer": torch.tensor(longer).unsqueeze(1)}
        whole = "max_length" if "input_features" in part.model_input_names else True
        found = part(sounds, sampling_rate=rate, padding=whole, return_attention_mask=True, return_tensors="pt")
        return {key: found[key] for key in ("input_values", "input_features", "attention_mask") if key in found}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the parts and `processor_config.json` (last) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, part) in self.parts.items():
            part.save_pretrained(folder / name)
        held = {
            "processor_class": type(self).__name__,
            "modalities": {name: kind for name, (kind, _) in self.parts.items()},
            "table": None if self.table is None else self.table.as_config(),
            "max_length": self.max_length,
            "max_frames": self.max_frames,
            "task": self.task,
            "classes": list(self.classes),
        }
        (folder / _FILE).write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None, **_: Any) -> FusionProcessor:
        """From a folder or a hub id. Further options are AutoProcessor's and mean nothing here.

        Raises BackboneError where there is no processor of this class.
        """
        try:
            file = cached_file(str(name_or_path), _FILE, revision=revision)
        except OSError as error:
            raise BackboneError(
                f"{name_or_path} holds no {_FILE}", do="give the folder that save_pretrained wrote"
            ) from error
        held = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        if held.get("processor_class") != cls.__name__:
            raise BackboneError(
                f"{name_or_path} holds a {held.get('processor_class')}", allowed=cls.__name__, do="use AutoProcessor"
            )
        parts = {}
        for name, kind in held["modalities"].items():
            if kind not in KINDS or not name.isidentifier():
                raise BackboneError(f"{name_or_path} names a modality '{name}' of kind '{kind}'", do="mend the file")
            part = _LOADERS[kind].from_pretrained(
                str(name_or_path), subfolder=name, revision=revision, trust_remote_code=False
            )
            parts[name] = (kind, part)
        table = None if held["table"] is None else TableSchema.from_config(held["table"])
        kept = {key: held[key] for key in ("max_length", "max_frames", "task", "classes")}
        return cls(parts, table, **kept)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, the middles of equal stretches."""
    return list(range(count)) if count <= most else [int((at + 0.5) * count / most) for at in range(most)]


def _read_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{type(value).__name__} is not a text", where=where, allowed="str, or None", do="mend the value"
        )
    return value


def _read_image(value: Any, where: str) -> Any:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value
    if not hasattr(value, "convert"):
        raise DataError(
            f"{type(value).__name__} is not a picture",
            where=where,
            allowed="PIL pictures, arrays, or None",
            do="open it",
        )
    return value.convert("RGB")


def _read_video(value: Any, where: str) -> list[Any]:
    frames = list(value) if not isinstance(value, str | bytes) else []
    if not frames:
        raise DataError(
            "a video without frames", where=where, allowed="a sequence of at least one picture, or None", do="mend it"
        )
    return [_read_image(frame, where) for frame in frames]


def _read_audio(value: Any, where: str) -> tuple[np.ndarray, int | None]:
    rate = None
    if isinstance(value, Mapping):
        rate = value.get("sampling_rate")
        value = value.get("array")
    try:
        sound = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        sound = np.zeros((0, 0), dtype=np.float32)
    if sound.ndim != 1 or len(sound) == 0:
        raise DataError(
            f"a sound of shape {sound.shape}", where=where, allowed="one channel of at least one sample, or None",
            do="mix it down to mono; leave an empty sound out of its row",
        )  # fmt: skip
    if not np.isfinite(sound).all():
        raise DataError("the sound holds NaN or infinite samples", where=where, allowed="finite samples", do="mend it")
    return sound, None if rate is None else int(rate)


_READERS: dict[str, Any] = {"text": _read_text, "image": _read_image, "video": _read_video, "audio": _read_audio}
