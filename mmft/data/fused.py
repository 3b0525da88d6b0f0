"""Rows of tables to batches for a fusion model: what each encoder is given, which rows have it, the labels.

Inputs are flat, so that the loop moves and casts them like any others: `MODALITY/KEY` for an encoder's input KEY,
`MODALITY?` for which rows have it. With stored features (`use`) an encoder's inputs are its stored tokens and the
medium is not opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmft.data.collate import Batch
from mmft.data.render import OverLength
from mmft.data.sample import Sample
from mmft.data.table_rows import label_of, modality_columns, open_sample
from mmft.data.tables import as_float
from mmft.errors import DataError, choices

NONE = "|"
"""Between the labels of a row with several; alone: the row has none."""


class Stored(Protocol):
    """Features of frozen encoders by row number."""

    @property
    def names(self) -> tuple[str, ...]:
        """Modalities that are stored."""
        ...

    def batch(self, rows: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """Modality -> `{"features", "mask"}`."""
        ...


class FusedRenderer:
    """Samples of a table to batches, with the processor of a fusion model, which knows the task and its labels.

    Raises DataError for a processor of another kind of model.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        over_length: OverLength = "error",
        max_image_pixels: int = 40_000_000,
    ) -> None:
        if not hasattr(processor, "parts") or not hasattr(processor, "modalities"):
            raise DataError(
                "rows of a table need the processor of a fusion model",
                where=type(processor).__name__ if processor is not None else "no processor",
                do="give a fusion model's folder, or model.encoders",
            )
        self.processor, self.task, self.classes = processor, processor.task, processor.classes
        self.tokenizers = {name: part for name, (kind, part) in processor.parts.items() if kind == "text"}
        longest = [int(one.model_max_length) for one in self.tokenizers.values()]
        self.max_length = min([max_length, *longest])
        processor.max_length = self.max_length
        self.over_length: OverLength = over_length
        self.max_image_pixels = max_image_pixels
        self.store: Stored | None = None
        self.places: dict[tuple[str, str], int] = {}
        rates = {int(part.sampling_rate) for kind, part in processor.parts.values() if kind == "audio"}
        self.sampling_rate = rates.pop() if rates else 16000

    def use(self, store: Stored | None, samples: Sequence[Sample] = ()) -> None:
        """Take the stored features of `samples`, which lie in the store in this order, instead of their media."""
        self.store = store
        self.places = {(sample.source, sample.id): at for at, sample in enumerate(samples)}

    def length(self, sample: Sample) -> int:
        """Tokens of the row's longest text; 1 where it has none."""
        texts = {modality_columns(sample).get(name): one for name, one in self.tokenizers.items()}
        lengths = [
            len(one(str(sample.cells[column].value), truncation=False)["input_ids"])
            for column, one in texts.items()
            if column is not None and sample.cells[column].value is not None
        ]
        return max(lengths, default=1)

    def fits(self, sample: Sample) -> bool:
        """Whether every text of the row has at most `max_length` tokens."""
        return self.length(sample) <= self.max_length

    def target(self, sample: Sample) -> list[float] | int:
        """The row's label as the model is given it. Raises DataError for an empty or undeclared label."""
        word = label_of(sample)
        where = sample.where or sample.id
        if self.task == "regression":
            number = as_float(word)
            if number is None or not math.isfinite(number):
                raise DataError(f"the label {word!r} is no finite number", where=where, do="mend it")
            return [number]
        words = [one.strip() for one in word.split(NONE)] if self.task == "multi_label" else [word]
        for one in words:
            if one not in self.classes and (one or self.task != "multi_label"):
                raise DataError(
                    f"the label '{one}' is not in the declared set",
                    where=where,
                    allowed=choices(self.classes, word=one),
                    do="mend the label, or declare it in objective.classes",
                )
        if self.task == "multi_label":
            return [float(name in words) for name in self.classes]
        return self.classes.index(word)

    def opened(self, sample: Sample, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """The row as the processor takes it; modalities `without` are not opened."""
        columns = modality_columns(sample)
        kept = {name: cell for name, cell in sample.cells.items() if name not in {columns.get(one) for one in without}}
        held = Sample(id=sample.id, turns=(), cells=kept, where=sample.where)
        found = open_sample(
            held,
            sampling_rate=self.sampling_rate,
            frames=self.processor.max_frames,
            max_image_pixels=self.max_image_pixels,
        )
        return {name: value for name, value in found.items() if name in self.processor.modalities}

    def inputs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`{"modalities", "present"}` of some rows for `FusionModel`, without their labels."""
        stored = self.store.names if self.store is not None else ()
        found = self.processor([self.opened(sample, without=stored) for sample in samples])
        if self.store is not None:
            held = self.store.batch([self.places[sample.source, sample.id] for sample in samples])
            for name in stored:
                found["modalities"].pop(name, None)
                rows = held[name]["mask"].any(dim=1) if name in held else torch.zeros(len(samples), dtype=torch.bool)
                found["present"][name] = rows
            found["modalities"] |= held
        return found

    @staticmethod
    def place(found: Mapping[str, Any], model: Any) -> dict[str, Any]:
        """`inputs` on a model's device, in the type of its weights."""
        dtype, device = model.dtype, model.device
        modalities = {
            name: {
                key: value.to(device, dtype) if value.is_floating_point() else value.to(device)
                for key, value in inputs.items()
            }
            for name, inputs in found["modalities"].items()
        }
        return {"modalities": modalities, "present": {key: one.to(device) for key, one in found["present"].items()}}

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """The batch of (sample, epoch) rows. Raises DataError naming the row and column of what cannot be read."""
        samples = [sample for sample, _ in rows]
        found = self.inputs(samples)
        tokens = [inputs["attention_mask"] for name, inputs in found["modalities"].items() if name in self.tokenizers
                  and "attention_mask" in inputs]  # fmt: skip
        real, all_tokens = sum(int(mask.sum()) for mask in tokens), sum(mask.numel() for mask in tokens)
        return Batch(
            inputs=flat(found),
            labels=self.targets(samples),
            ids=tuple(sample.id for sample in samples),
            supervised=len(samples),
            tokens=real or len(samples),
            padding=all_tokens - real,
            counted=tuple((sample.source, 1) for sample in samples),
        )

    def targets(self, samples: Sequence[Sample]) -> Tensor:
        """Labels as the heads take them: (B,) int64, or (B, L) float32 for several labels and for regression."""
        found = [self.target(sample) for sample in samples]
        kind = torch.float32 if self.task in ("multi_label", "regression") else torch.int64
        return torch.tensor(found, dtype=kind)


def flat(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """`{"modalities", "present"}` as one level of names."""
    named = {f"{name}/{key}": value for name, inputs in found["modalities"].items() for key, value in inputs.items()}
    return named | {f"{name}?": value for name, value in found["present"].items()}


def nested(inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`flat` undone: what `FusionModel` is called with."""
    modalities: dict[str, Any] = {}
    present: dict[str, Any] = {}
    for name, value in inputs.items():
        if name.endswith("?"):
            present[name.removesuffix("?")] = value
        else:
            modality, _, key = name.partition("/")
            modalities.setdefault(modality, {})[key] = value
    return {"modalities": modalities, "present": present}
