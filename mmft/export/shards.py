"""safetensors folders as streams: headers, row blocks and the plan of the shards, never a whole shard in memory.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header with
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes one after another.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmft.errors import ExportError
from mmft.headers import MOST_HEADER

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_ELEMENTS = 512 << 10  # elements of a row block: 2 MiB in float32, so that a few stay in the cache
_COPY_BYTES = 1 << 20
_HEADER_LIMIT = MOST_HEADER
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a folder: where its bytes are."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, in the file
    nbytes: int

    @property
    def rows(self) -> int:
        """Size of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The tensors of one or more safetensors files, read with `pread`; close it, or use it as a context.

    Raises ExportError when a header is damaged, a file is missing or shorter than its header says, or a name
    occurs twice.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, int] = {}
        for file in files:
            for entry in _read_header(file):
                if entry.name in self.entries:
                    raise ExportError(
                        f"tensor {entry.name} is in two files",
                        where=f"{self.entries[entry.name].file}, {file}",
                        do="report this; the base's files may have changed meanwhile",
                    )
                self.entries[entry.name] = entry

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start:stop` of the first axis as a new tensor of their own shape (a scalar stays a scalar)."""
        entry = self.entries[name]
        if not entry.shape:
            return self._bytes(entry, 0, entry.nbytes).view(entry.dtype).reshape(())
        stop = entry.rows if stop is None else stop
        width = entry.row_elements * entry.dtype.itemsize
        flat = self._bytes(entry, start * width, (stop - start) * width)
        return flat.view(entry.dtype).reshape(stop - start, *entry.shape[1:])

    def matrix(self, name: str, start: int, stop: int, *, stacked: bool = False) -> torch.Tensor:
        """Rows `start:stop` of the tensor seen as a matrix (see `view`), as a new tensor (stop - start, width)."""
        entry = self.entries[name]
        width = view(entry.shape, stacked=stacked)[1]
        size = width * entry.dtype.itemsize
        return self._bytes(entry, start * size, (stop - start) * size).view(entry.dtype).reshape(-1, width)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, a few MB at a time."""
        entry = self.entries[name]
        for start in range(0, entry.nbytes, _COPY_BYTES):
            yield as_bytes(self._bytes(entry, start, min(_COPY_BYTES, entry.nbytes - start)))

    def _bytes(self, entry: Entry, start: int, count: int) -> torch.Tensor:
        if entry.file not in self._handles:
            self._handles[entry.file] = os.open(entry.file, os.O_RDONLY | os.O_CLOEXEC)
        buffer = torch.empty(count, dtype=torch.uint8)
        view, done = as_bytes(buffer), 0
        while done < count:
            got = os.preadv(self._handles[entry.file], [view[done:]], entry.offset + start + done)
            if not got:
                raise ExportError(
                    f"the file ends inside tensor {entry.name}",
                    where=str(entry.file),
                    do="copy or download the folder again from its source",
                )
            done += got
        return buffer


def view(shape: tuple[int, ...], *, stacked: bool = False) -> tuple[int, int]:
    """(rows, width) of a tensor seen as a matrix: `(n,)` is (n, 1), a kernel (out, in, kh, kw) is (out, in·kh·kw).

    `stacked` takes all axes but the last into the rows: experts (E, a, b) are (E·a, b).
    """
    if not shape:
        return 1, 1
    if stacked and len(shape) > 1:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor without a copy (with one if it is not contiguous)."""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index if it has one; ExportError when there are none."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        raise ExportError(
            f"{folder.name} holds no safetensors weights",
            where=str(folder),
            allowed=f"{SINGLE}, or {INDEX} with its shards",
            do="convert the checkpoint to safetensors (load it and call save_pretrained)",
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{INDEX} cannot be read: {error}", where=str(index), do="copy or download the folder again from its source"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ExportError(
                f"{INDEX} names a file that is not in the folder: {name}",
                where=str(index),
                do="copy or download the folder again from its source",
            )
    return [folder / name for name in names]


def _read_header(file: Path) -> list[Entry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"header of {length} bytes in a file of {size} bytes")
            header = json.loads(stream.read(length))
        entries = [_entry(file, name, info, 8 + length) for name, info in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(
            f"{file.name} is not a safetensors file: {error}",
            where=str(file),
            do="copy or download the folder again from its source",
        ) from error
    entries.sort(key=lambda entry: entry.offset)
    at = 8 + length
    for entry in entries:
        if entry.offset != at:
            raise ExportError(
                f"{file.name}: tensor {entry.name} does not follow its neighbour",
                where=str(file),
                do="copy or download the folder again from its source",
            )
        at += entry.nbytes
    if at != size:
        raise ExportError(
            f"{file.name} has {size:,} bytes, its header says {at:,}",
            where=str(file),
            do="copy or download the folder again from its source",
        )
    return entries


def _entry(file: Path, name: str, info: Mapping[str, object], base: int) -> Entry:
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name} has type {code}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"tensor {name} has shape {shape}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"tensor {name} has offsets {offsets}")
    nbytes = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"tensor {name} has {offsets[1] - offsets[0]} bytes, its shape needs {nbytes}")
    return Entry(name, file, DTYPES[code], tuple(shape), base + offsets[0], nbytes)


def row_blocks(entry: Entry, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """`blocks_of` a tensor's first axis."""
    yield from blocks_of(entry.rows, entry.row_elements, elements)


def blocks_of(rows: int, width: int, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of blocks of rows of about `elements` elements.

    All have a multiple of 64 rows but the last, which has at least 64: BLAS then gives each row the very bits it has
    in the whole product (thin blocks take other kernels), and no 4-bit quantization block is cut.
    """
    elements = BLOCK_ELEMENTS if elements is None else elements
    step = max(64, elements // max(1, width) // 64 * 64)
    start = 0
    while start < rows:
        stop = start + step
        if rows - stop < 64:
            stop = rows
        yield start, stop
        start = stop


def parse_size(size: str | int) -> int:
    """`"5GB"` (10^9, as transformers counts), `"5GiB"`, `"300MB"` or a number of bytes; ExportError otherwise."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    text = str(size).strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * _UNITS[unit])
    raise ExportError(
        f"max_shard_size {size!r} is not a size",
        where="export.max_shard_size",
        allowed="5GB, 500MB, 2GiB",
        do="write for example 5GB",
    )


def plan_shards(outputs: Iterable[Output], max_bytes: int) -> dict[str, list[Output]]:
    """File name -> its tensors, in the order given; a tensor larger than `max_bytes` gets a file of its own."""
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}
