"""Other formats of a finished model: Hugging Face in another type or shard size, ONNX, GGUF, an adapter layout.

Nothing is trained or merged here: an adapter is merged first (`mmft merge`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mmft.errors import ExportError, choices
from mmft.export.dequantized import open_weights, plain_config
from mmft.export.shards import Output, Weights, as_bytes, parse_size, plan_shards
from mmft.export.shards import row_blocks as blocks
from mmft.export.sidefiles import copy_files, set_dtype
from mmft.export.writer import hashed_folder, write_shards
from mmft.files import read_json_file, require_free, scratch_folder, write_json

FORMATS = ("hf", "onnx", "gguf", "adapter")
TYPES = ("float32", "bfloat16", "float16")


def export_folder(
    folder: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    layout: str | None = None,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Write a run's result, a model folder or (`to="adapter"`) an adapter folder in another format at `out`.

    Returns `{"format", "folder", "files", ...}`. `dtype` is the type of the weights (the folder's own if None),
    `max_shard_size` is for `hf`, `layout` and `base` (a folder, where the
    adapter does not name it) for `adapter`. Raises ExportError for a format that this model cannot have,
    with the reason, and when the result does not equal the model; `out` is complete or absent.
    """
    if to not in FORMATS:
        raise ExportError(
            f"the format {to!r} is unknown", where="--to", allowed=choices(FORMATS, word=to), do="choose one of them"
        )
    if dtype is not None and dtype not in TYPES:
        raise ExportError(
            f"the type {dtype!r} is unknown",
            where="--dtype",
            allowed=choices(TYPES, word=dtype),
            do="choose one of them",
        )
    source, target = find_source(Path(folder), adapter=to == "adapter"), Path(out)
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target.name} exists already", where=str(target), do="delete it, or write elsewhere")
    if to == "hf":
        found = copy_model(source, target, dtype=dtype, max_shard_size=max_shard_size)
    elif to == "onnx":
        from mmft.export.onnx import export_onnx

        found = export_onnx(source, target, dtype=dtype)
    elif to == "gguf":
        from mmft.export.gguf import export_gguf

        found = export_gguf(source, target, dtype=dtype)
    else:
        found = _export_adapter(source, target, layout, base=base)
    return {"format": to, "source": str(source), "folder": str(target), **found}


def find_source(folder: Path, *, adapter: bool = False) -> Path:
    """The folder that is exported: of a run its merged (or fully trained) model, or its adapter.

    Raises ExportError when it is not there.
    """
    if (folder / "recipe.yaml").is_file():
        names = ("adapter",) if adapter else ("merged", "model")
        for name in names:
            if (folder / name).is_dir():
                return folder / name
        raise ExportError(
            f"the run {folder.name} has no {' or '.join(f'{name}/' for name in names)}",
            where=str(folder),
            do="train it to its end (mmft train --resume)" if adapter else f"merge it first: mmft merge {folder}",
        )
    has_adapter = (folder / "adapter_config.json").is_file()
    if adapter and not has_adapter:
        raise ExportError(
            f"{folder} is not an adapter folder", where=str(folder), do="give the folder with adapter_config.json"
        )
    if not adapter and has_adapter:
        raise ExportError(
            f"{folder} is an adapter; this format needs whole weights",
            where=str(folder),
            do=f"merge it first: mmft merge {folder} --out MERGED",
        )
    if not adapter and not (folder / "config.json").is_file():
        raise ExportError(
            f"{folder} is neither a run nor a model folder",
            where=str(folder),
            allowed="a run folder, a folder with config.json and safetensors",
            do="check the path",
        )
    return folder


def copy_model(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The same model folder with its weights in `dtype`, in shards of at most `max_shard_size`.

    Names and order of the tensors are the folder's own (the layout that transformers and vLLM read); weights of
    bitsandbytes are written as the 16-bit weights they stand for. Memory is a row block, whatever the size; price: one
    read and one write. Raises ExportError when a value does not fit into `dtype`.
    """
    limit = parse_size(max_shard_size)
    wanted: torch.dtype | None = getattr(torch, dtype) if dtype else None
    with open_weights(folder) as weights:
        outputs = [
            Output(name, wanted if wanted and entry.dtype.is_floating_point else entry.dtype, entry.shape)
            for name, entry in weights.entries.items()
        ]
        total = sum(output.nbytes for output in outputs)
        require_free(out, total + (64 << 20), what=f"the model {out.name}")
        shards = plan_shards(outputs, limit)
        done = 0

        def pieces(output: Output) -> Iterator[memoryview]:
            nonlocal done
            for piece in _pieces(weights, output):
                yield piece
                done += len(piece)
                if progress is not None:
                    progress(done, total)

        with hashed_folder(out) as (target, known):
            known.update(write_shards(target, shards, pieces))
            copy_files(folder, target)
            config = plain_config(folder)
            if dtype is not None:
                set_dtype(config, dtype)
            write_json(target / "config.json", config)
    return {"files": sorted(shards), "tensors": len(outputs), "total_size": total}


@contextlib.contextmanager
def plain_base(folder: Path, beside: Path) -> Iterator[Path]:
    """`folder` itself, or, where its weights are quantized, a temporary folder beside `beside` with the 16-bit
    weights it computes with: the base that `merge_adapter` and `verify_merge` take. Price: that folder's disk space.
    """
    config = read_json_file(folder / "config.json")
    if plain_config(folder) == config:
        yield folder
        return
    with scratch_folder(beside.parent, f"{beside.name}.base") as scratch:
        copy_model(folder, scratch / "base")
        yield scratch / "base"


def _pieces(weights: Weights, output: Output) -> Iterator[memoryview]:
    entry = weights.entries[output.name]
    if output.dtype == entry.dtype:
        yield from weights.pieces(output.name)
        return
    for start, stop in blocks(entry):
        rows = weights.read(output.name, start, stop)
        cast = rows.to(output.dtype)
        if not torch.equal(torch.isfinite(cast), torch.isfinite(rows)):
            raise ExportError(
                f"{output.name} holds values that {str(output.dtype).removeprefix('torch.')} cannot",
                where=str(entry.file),
                do="export in bfloat16 or float32",
            )
        yield as_bytes(cast)


def _export_adapter(source: Path, target: Path, layout: str | None, *, base: str | Path | None) -> dict[str, Any]:
    from mmft.export.layout import export_layout

    if layout is None:
        raise ExportError("no layout is named", where="--layout", do="name one, for example --layout transformers-4.51")
    renamed = export_layout(source, target, layout, base=Path(base) if base else None)
    return {"layout": layout, "tensors": len(renamed), "files": sorted(path.name for path in target.iterdir())}
