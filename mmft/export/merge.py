"""Merge an adapter into its base folder tensor by tensor; the model is never built with real weights.

Peak anonymous memory is the module's factors and a few row blocks, whatever the checkpoint's size (tensors that the
loader converts in groups, such as a fused qkv, are held whole while their group is written). Price: one read and one
write of all weights, and one more read for the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mmft.errors import ExportError
from mmft.export.delta import Adapter, Update, open_adapter, resolve_updates
from mmft.export.names import NameMap, map_names, meta_model
from mmft.export.produce import Change, Job, Producer
from mmft.export.shards import INDEX, Output, Weights, index_json, parse_size, plan_shards, weight_files, write_shard
from mmft.files import atomic_folder, remove_stale, require_free, write_json
from mmft.recipe.schema import QuantizationSection

REPORT = "merge_report.json"
Onto = Literal["base", "dequantized"]
_TYPES = ("float32", "bfloat16", "float16")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_NOT_COPIED = (REPORT, "MANIFEST.json", "config.json")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Norms are Frobenius norms; sizes are bytes."""

    base: str
    adapter: str
    onto: Onto
    dtype: str | None
    quantization: dict[str, Any] | None
    quantized_modules: tuple[str, ...]
    tensors: int
    untouched: int
    adapter_tensors: int
    total_size: int
    files: tuple[str, ...]
    untied: tuple[str, ...]
    unused: tuple[str, ...]
    delta_norm: float
    quantization_error: float | None  # |W - dequantized W| / |W| over all quantized tensors
    quantization_error_to_delta: float | None  # the same difference, over |s B A| of the same tensors
    seconds: float
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in merge_report.json."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    *,
    onto: Onto = "base",
    quantization: QuantizationSection | None = None,
    quantized_modules: Sequence[str] = (),
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write `base + adapter` as an ordinary model folder at `out`, complete or not at all.

    `quantized_modules` are the runtime names of the modules that were quantized in training, `dtype` the type weights
    are read into before anything is added (the base's own if None). `progress(done, total)` counts bytes.
    Raises ExportError when `out` exists, an adapter tensor has no home, a value is not finite, or the adapter's
    method cannot be streamed; CheckpointError when the disk is full.
    """
    started = time.monotonic()
    base_folder, adapter_folder, out = Path(base_folder), Path(adapter_folder), Path(out)
    _check(out, onto=onto, quantization=quantization, quantized_modules=quantized_modules, dtype=dtype)
    limit = parse_size(max_shard_size)
    adapter = open_adapter(adapter_folder)
    with adapter.weights, Weights(weight_files(base_folder)) as weights:
        names = map_names(meta_model(base_folder), weights.entries)
        updates = resolve_updates(adapter, names)
        quantized = quantized_names(names, quantized_modules, updates)
        jobs, untied = plan_jobs(names, updates, weights, adapter=adapter, quantized=quantized, onto=onto)
        producer = Producer(
            adapter,
            weights,
            names,
            jobs=jobs,
            updates=updates,
            quantized=quantized,
            dtype=dtype,
            quantization=quantization,
            onto=onto,
        )
        outputs = [producer.output(job) for job in jobs.values()]
        total = sum(output.nbytes for output in outputs)
        require_free(out, total + (64 << 20), what=f"the merged model {out.name}")
        remove_stale(out.parent)
        with atomic_folder(out) as folder:
            files = _write_weights(folder, outputs, producer, limit=limit, progress=progress)
            _copy_files(base_folder, folder)
            _write_config(base_folder, folder, untie=bool(untied), dtype=dtype, outputs=outputs)
            _check_untied(folder, untied)
            report = _report(
                producer,
                base=base_folder,
                adapter=adapter,
                onto=onto,
                dtype=dtype,
                quantization=quantization,
                quantized=quantized_modules,
                files=files,
                untied=untied,
                total=total,
                seconds=time.monotonic() - started,
            )
            write_json(folder / REPORT, report.to_json())
    return report


def _write_weights(
    folder: Path,
    outputs: Sequence[Output],
    producer: Producer,
    *,
    limit: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[str, ...]:
    shards = plan_shards(outputs, limit)
    done, total = 0, sum(output.nbytes for output in outputs)

    def pieces(output: Output) -> Iterator[memoryview]:
        nonlocal done
        for piece in producer.pieces(output):
            yield piece
            done += len(piece)
            if progress is not None:
                progress(done, total)

    for file, members in shards.items():
        write_shard(folder / file, members, pieces)
    if len(shards) > 1:
        write_json(folder / INDEX, index_json(shards))
    return tuple(shards)


def _check(
    out: Path,
    *,
    onto: str,
    quantization: QuantizationSection | None,
    quantized_modules: Sequence[str],
    dtype: str | None,
) -> None:
    if out.exists() or out.is_symlink():
        raise ExportError(f"{out.name} exists already", where=str(out), do="delete it, or merge into another folder")
    if onto not in ("base", "dequantized"):
        raise ExportError(
            f"merge_onto {onto!r} is unknown",
            where="export.merge_onto",
            allowed="base, dequantized",
            do="choose one of them",
        )
    if dtype is not None and dtype not in _TYPES:
        raise ExportError(
            f"dtype {dtype!r} is unknown", where="export.dtype", allowed=", ".join(_TYPES), do="choose one of them"
        )
    active = quantization is not None and (quantization.load_in_4bit or quantization.load_in_8bit)
    if onto == "dequantized" and not (active and quantized_modules):
        raise ExportError(
            "merge_onto is dequantized, but nothing was quantized in training",
            where="export.merge_onto",
            do="set merge_onto: base, or name the quantization and the quantized modules",
        )
    if quantized_modules and not active:
        raise ExportError(
            f"{len(quantized_modules)} quantized modules are named, but no quantization is given",
            do="merge with peft's merge_and_unload",
        )


def quantized_names(names: NameMap, modules: Sequence[str], updates: dict[str, Update]) -> frozenset[str]:
    """Runtime weight names of the quantized modules; those that the adapter replaces whole were not quantized."""
    found = set()
    for module in modules:
        resolved = names.module(module)
        if resolved is None or f"{resolved}.weight" not in names.shapes:
            raise ExportError(
                f"quantized module {module} is not in the base",
                where=names.model.config.model_type,
                do="merge into the base this adapter was trained on",
            )
        found.add(f"{resolved}.weight")
    return frozenset(name for name in found if not (name in updates and updates[name].replace))


def plan_jobs(
    names: NameMap,
    updates: dict[str, Update],
    weights: Weights,
    *,
    adapter: Adapter,
    quantized: frozenset[str] = frozenset(),
    onto: Onto = "base",
) -> tuple[dict[str, Job], tuple[str, ...]]:
    """Checkpoint key -> what is written there, in the base's order, and the runtime names that had to be untied.

    Tensors shared by a tie are written separately as soon as the adapter does not do the same to both ends, because
    the adapter model holds two different weights then. Raises ExportError when an update finds no tensor on disk.
    """
    jobs: dict[str, Job] = {}
    members = {key: group for group in names.groups for key in group.keys}
    for key, entry in weights.entries.items():
        name = names.runtime.get(key)
        if name is not None and entry.shape != names.shapes[name]:
            raise ExportError(
                f"{key} has shape {list(entry.shape)}, the model's {name} has {list(names.shapes[name])}",
                where=str(entry.file),
                do="merge with peft's merge_and_unload",
            )
        group = members.get(key)
        changing = {*updates, *(quantized if onto == "dequantized" else ())}
        touched = changing.intersection(group.targets) if group else frozenset()
        jobs[key] = Job(key, key, name, updates.get(name or ""), name in quantized, group, frozenset(touched))
    grouped = {target for group in names.groups for target in group.targets}
    lost = sorted(name for name in (*updates, *quantized) if name not in {*names.home, *grouped, *names.ties})
    if lost:
        raise ExportError(f"the base folder has no tensor for {', '.join(lost)}", do="give the whole base checkpoint")
    untied = []
    for target, source in names.ties.items():
        here, there = updates.get(target), updates.get(source)
        quantized_apart = onto == "dequantized" and (target in quantized) != (source in quantized)
        if not quantized_apart and _same(here, there, adapter):
            continue
        if source not in names.home:
            raise ExportError(
                f"{target} and {source} are tied inside converted tensors and cannot be merged apart",
                do="merge with peft's merge_and_unload",
            )
        key = names.new_key(target)
        jobs[key] = Job(key, names.home[source], target, here, target in quantized, None)
        untied.append(target)
    for target, source in (getattr(names.model, "all_tied_weights_keys", None) or {}).items():
        apart = target in names.home and source in names.home
        if apart and (target in updates or source in updates):
            untied.append(target)
    return jobs, tuple(untied)


def _same(here: Update | None, there: Update | None, adapter: Adapter) -> bool:
    """Whether both ends of a tie get the same values (peft may save a tied module twice)."""
    if here is None or there is None:
        return here is there
    if not (here.replace and there.replace) or here.lora or there.lora:
        return False
    return torch.equal(adapter.weights.read(here.replace), adapter.weights.read(there.replace))


def _copy_files(base: Path, folder: Path) -> None:
    for path in sorted((*base.iterdir(), *(base / "additional_chat_templates").glob("*.jinja"))):
        plain = not path.name.startswith(".") and path.suffix not in (".py", ".pyc") and path.name not in _NOT_COPIED
        if plain and path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            target = folder / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)  # not its mode, and the file itself where a hub cache has a link


def _write_config(base: Path, folder: Path, *, untie: bool, dtype: str | None, outputs: Sequence[Output]) -> None:
    config = json.loads((base / "config.json").read_bytes())
    if dtype is not None or not (config.get("dtype") or config.get("torch_dtype")):
        sizes: dict[str, int] = {}
        for output in outputs:
            if output.dtype.is_floating_point:
                name = str(output.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + output.nbytes
        set_dtype(config, dtype or max(sizes, key=lambda name: sizes[name], default="float32"))
    if untie:
        _untie(config)
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write the type of the weights into a config and those of its parts that state one."""
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            set_dtype(value, dtype)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype


def _untie(config: dict[str, Any]) -> None:
    if config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict):
            _untie(value)
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False  # its class may tie by default


def _check_untied(folder: Path, untied: Sequence[str]) -> None:
    if untied:
        left = getattr(meta_model(folder), "all_tied_weights_keys", None) or {}
        both = [name for name in untied if name in left or name in left.values()]
        if both:
            raise ExportError(
                f"{', '.join(both)} cannot be untied in this model, so the adapter cannot be merged",
                do="merge with peft's merge_and_unload",
            )


def _report(
    producer: Producer,
    *,
    base: Path,
    adapter: Adapter,
    onto: Onto,
    dtype: str | None,
    quantization: QuantizationSection | None,
    quantized: Sequence[str],
    files: tuple[str, ...],
    untied: tuple[str, ...],
    total: int,
    seconds: float,
) -> MergeReport:
    changes = tuple(producer.changes.values())
    measured = [change for change in changes if change.quantization_error is not None]
    lost = sum((c.quantization_error or 0.0) ** 2 for c in measured) ** 0.5
    weight = sum(c.weight_norm**2 for c in measured) ** 0.5
    delta = sum(c.delta_norm**2 for c in measured) ** 0.5
    written = sum(job.changed(onto) for job in producer.jobs.values())
    return MergeReport(
        base=str(base),
        adapter=str(adapter.folder),
        onto=onto,
        dtype=dtype,
        quantization=quantization.model_dump(mode="json") if quantization else None,
        quantized_modules=tuple(quantized),
        tensors=len(producer.jobs),
        untouched=len(producer.jobs) - written,
        adapter_tensors=len(adapter.weights.entries),
        total_size=total,
        files=files,
        untied=untied,
        unused=producer.names.unused,
        delta_norm=sum(c.delta_norm**2 for c in changes) ** 0.5,
        quantization_error=lost / weight if measured and weight else None,
        quantization_error_to_delta=lost / delta if measured and delta else None,
        seconds=round(seconds, 3),
        changes=changes,
    )
