"""A folder of bitsandbytes weights read as the 16-bit weights it computes with, in row blocks.

bitsandbytes stores `W` as codes with one maximum per block of weights (4 bits, QLoRA: Dettmers et al. 2023, arXiv
2305.14314) or per row (int8: Dettmers et al. 2022, arXiv 2208.07339). What is read here is what a forward sees, so a
merge onto it is a merge onto the weights that training saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch

from mmft.backbones.quantize import stored_quantization
from mmft.errors import ExportError
from mmft.export.shards import Entry, Weights, as_bytes, row_blocks, weight_files
from mmft.files import read_json_file

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class _Four:
    """What a packed 4-bit weight needs to be unpacked."""

    absmax: torch.Tensor  # float32, one per block
    code: torch.Tensor
    block: int
    kind: str


class DequantizedWeights(Weights):
    """Like `Weights`, but quantized tensors have their 16-bit type and shape, and their constants are not listed.

    `dtype` is the type of dequantized int8 tensors, which do not state one. Raises ExportError when a constant is
    missing. Memory: the constants of one tensor (1/16 of its bytes in 16 bits) and a row block.
    """

    def __init__(self, files: list[Path], dtype: torch.dtype) -> None:
        super().__init__(files)
        self._stored = dict(self.entries)
        self._held: tuple[str, _Four] | None = None
        self._kinds: dict[str, str] = {}  # name -> key of its state (4 bits) or of its row maxima (8 bits)
        for key in self._stored:
            if _STATE in key:
                name = key.partition(_STATE)[0]
                state = self._state(key)
                self._replace(name, key, getattr(torch, state["dtype"]), tuple(state["shape"]))
                hidden = (key, *(name + ending for ending in _COMPANIONS))
            elif key.endswith(".SCB") and (name := key.removesuffix("SCB") + "weight") in self._stored:
                self._replace(name, key, dtype, self._stored[name].shape)
                hidden = (key, key.removesuffix("SCB") + "weight_format")
            else:
                continue
            for extra in hidden:
                self.entries.pop(extra, None)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start:stop`, dequantized."""
        if name not in self._kinds:
            return super().read(name, start, stop)
        entry = self.entries[name]
        stop = entry.rows if stop is None else stop
        if _STATE in self._kinds[name]:
            return self._four(entry, start, stop)
        flat = self._raw(name, start * entry.row_elements, stop * entry.row_elements).view(torch.int8)
        scales = self._constant(self._kinds[name])[start:stop].float()
        codes = flat.reshape(stop - start, *entry.shape[1:]).float()
        return (codes * scales.unsqueeze(1) / 127.0).to(entry.dtype)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, row block by row block."""
        if name not in self._kinds:
            yield from super().pieces(name)
            return
        for start, stop in row_blocks(self.entries[name]):
            yield as_bytes(self.read(name, start, stop))

    def _replace(self, name: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if name not in self._stored:
            raise ExportError(f"{key} is there, but {name} is not", do="copy the folder again from its source")
        elements = 1
        for size in shape:
            elements *= size
        self._kinds[name] = key
        self.entries[name] = replace(self._stored[name], dtype=dtype, shape=shape, nbytes=elements * dtype.itemsize)

    def _state(self, key: str) -> dict[str, Any]:
        return json.loads(bytes(self._constant(key).tolist()))

    def _constant(self, key: str) -> torch.Tensor:
        entry = self._stored[key]
        return self._bytes(entry, 0, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def _raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._bytes(self._stored[name], start, stop - start)

    def _four(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        if self._held is None or self._held[0] != entry.name:
            self._held = (entry.name, self._constants(entry.name))
        held, width = self._held[1], entry.row_elements
        total = entry.rows * width
        first, last = start * width // held.block, -(-stop * width // held.block)
        begin, end = first * held.block, min(last * held.block, total)
        packed = self._raw(entry.name, begin // 2, -(-end // 2))
        # As rows of one block each: bitsandbytes' CPU kernel gives wrong values where a row does not end with a block.
        packed = torch.nn.functional.pad(packed, (0, (last - first) * held.block // 2 - packed.numel()))
        shape = torch.Size((last - first, held.block))
        state = bnb.QuantState(
            absmax=held.absmax[first:last].contiguous(),
            shape=shape,
            dtype=entry.dtype,
            code=held.code,
            blocksize=held.block,
            quant_type=held.kind,
        )
        flat = bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(-1)
        return flat[start * width - begin : stop * width - begin].reshape(stop - start, *entry.shape[1:]).clone()

    def _constants(self, name: str) -> _Four:
        state = self._state(self._kinds[name])

        def tensor(ending: str) -> torch.Tensor:
            if name + ending not in self._stored:
                raise ExportError(f"{name + ending} is missing", do="copy the folder again from its source")
            return self._constant(name + ending)

        absmax = tensor(".absmax")
        if "nested_blocksize" in state:
            nested = bnb.QuantState(
                absmax=tensor(".nested_absmax"),
                code=tensor(".nested_quant_map"),
                blocksize=state["nested_blocksize"],
                dtype=torch.float32,
            )
            absmax = bnb.dequantize_blockwise(absmax, nested) + state["nested_offset"]
        return _Four(absmax.float(), tensor(".quant_map"), state["blocksize"], state["quant_type"])


def open_weights(folder: Path) -> Weights:
    """The tensors of a model folder, dequantized where bitsandbytes quantized them.

    Raises ExportError for a folder quantized by another method, and what `Weights` raises.
    """
    config = read_json_file(folder / "config.json")
    raw = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not raw:
        return Weights(weight_files(folder))
    method = str(raw.get("quant_method", "bitsandbytes"))
    if not method.startswith("bitsandbytes"):
        raise ExportError(
            f"the weights are quantized by {method}, which mmft cannot turn back into 16 bits",
            where=str(folder / "config.json"),
            allowed="16 and 32 bit weights, bitsandbytes",
            do="give the 16-bit checkpoint this one was made from",
        )
    stored_quantization(config, name=str(folder))  # complains about a config that says nothing useful
    return DequantizedWeights(weight_files(folder), getattr(torch, str(config.get("dtype") or "bfloat16")))


def plain_config(folder: Path) -> dict[str, Any]:
    """config.json without what it says about quantization."""
    config = read_json_file(folder / "config.json")
    for holder in (config, config.get("text_config") or {}):
        holder.pop("quantization_config", None)
    return config
