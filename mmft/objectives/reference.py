"""Reference log-probabilities: the model with its adapter off, or as it was when training started, kept on disk."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmft.data.preference_render import PreferenceBatch
from mmft.files import sha256_bytes, write_bytes

Run = Callable[[PreferenceBatch], Tensor]
"""log p of every answer of a batch, (R,)."""


class AdapterOff:
    """The reference is the base: one more forward of every batch with the adapter switched off, no gradient."""

    def __init__(self, model: Any, run: Run) -> None:
        self._model, self._run = model, run

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """log q of the batch's answers, (R,)."""
        with torch.no_grad(), self._model.disable_adapter():
            return self._run(batch)


class Kept:
    """The reference is a table: answer -> log q, made once. Answers that are not in it are asked of `otherwise`."""

    def __init__(self, table: dict[int, float], otherwise: Run | None = None) -> None:
        self.table, self._otherwise = table, otherwise

    def __call__(self, batch: PreferenceBatch) -> Tensor:
        """log q of the batch's answers, (R,); KeyError for an answer that is not in the table."""
        if self._otherwise is not None and any(key not in self.table for key in batch.keys):
            return self._otherwise(batch)
        device = batch.inputs["input_ids"].device
        return torch.tensor([self.table[key] for key in batch.keys], dtype=torch.float32, device=device)


def make_table(batches: Iterable[PreferenceBatch], run: Run, *, path: Path) -> dict[int, float]:
    """log q of every answer of the batches, read from `path` where it is, else made and kept there.

    Values are those of the very batches given (the first where an answer comes twice): a run that walks the same
    batches with the adapter off sees the same bits (with the feature store, to the rounding of a tower's batch).
    """
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return dict(zip(stored["keys"].tolist(), stored["values"].tolist(), strict=True))
    table: dict[int, float] = {}
    with torch.no_grad():
        for batch in batches:
            table = dict(zip(batch.keys, run(batch).float().tolist(), strict=True)) | table
    out = io.BytesIO()
    keys, values = np.array(list(table), dtype=np.int64), np.array(list(table.values()), dtype=np.float32)
    np.savez(out, keys=keys, values=values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, out.getvalue())
    return table


def table_path(*parts: object) -> Path:
    """Where a table of these facts (base, data, layout, type) is kept: below `MMFT_CACHE`, else `~/.cache/mmft`."""
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    return cache / "reference" / f"{sha256_bytes(chr(10).join(map(str, parts)).encode())[:24]}.npz"


def placed(batch: PreferenceBatch, dtype: torch.dtype, device: torch.device) -> PreferenceBatch:
    """The batch on the device, its pictures in the type of the weights (as the engine places it)."""
    tensors = {key: value for key, value in batch.inputs.items() if isinstance(value, Tensor)}
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    inputs = {**batch.inputs, **{key: value.to(device) for key, value in cast.items()}}
    altered = None if batch.altered is None else placed(batch.altered, dtype, device)
    return dataclasses.replace(batch, inputs=inputs, altered=altered)
