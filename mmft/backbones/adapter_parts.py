"""What an adapter folder touches, told by the parts of its base: no weight of the base is read, only tensor headers.

Keys are matched with module names as peft wrote them, with another tool's prefixes taken off, and through
transformers' own renaming of older checkpoints; a key that still names nothing is listed, never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmft.backbones.parts import Parts
from mmft.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
_MARKER = re.compile(
    r"\.(lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|randlora_|ln_tuning|modules_to_save|original_module|base_layer"
    r"|adapter_|bottleneck|trainable_tokens|token_adapter)"
)
_RANKED = re.compile(r"\.(lora_A|lora_embedding_A|hada_w1_b|lokr_w2_b)\b")
_WRAPPERS = ("base_model.model.", "base_model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
_TOWERS = {"vision": "vision tower", "audio": "audio tower"}


@dataclass(frozen=True)
class AdapterFiles:
    """The config and the tensor shapes of an adapter folder."""

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def base(self) -> str | None:
        """The base model it was trained on, by its config."""
        return self.config.get("base_model_name_or_path") or None


def read_adapter(folder: Path) -> AdapterFiles:
    """Read config and headers. Raises AdapterError for what is no peft adapter folder with safetensors weights."""
    allowed = f"a folder with adapter_config.json and {WEIGHTS}"
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} holds no {name}", where=str(folder), allowed=allowed, do="give the folder of an adapter"
            )
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(str(folder / WEIGHTS), framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(
            f"the adapter cannot be read: {error}", where=str(folder), allowed=allowed, do="copy the folder again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json is no object", where=str(folder), allowed=allowed, do="restore it")
    return AdapterFiles(folder, config, shapes)


def describe_adapter(model: Any, parts: Parts, files: AdapterFiles) -> dict[str, Any]:
    """`{"folder", "base", "method", "ranks", "parameters", "parts", "prompt", "unknown", "warnings"}`.

    `parts`: part -> modules (names), parameters, ranks and sub-parts (number of modules and parameters each);
    `prompt`: parameters of learned prompts, which lie in no module; `unknown`: keys that name nothing in this model.
    """
    find = _Finder(model)
    rows: dict[str, dict[str, Any]] = {}
    homes: dict[str, set[str]] = {}
    unknown, prompt = [], 0
    for key, shape in files.shapes.items():
        module = find.module(key)
        if module is None:
            if re.search(r"prompt_|prefix", key):
                prompt += prod(shape)
            else:
                unknown.append(key)
            continue
        part, sub = parts.part_of(module), parts.subpart_of(module)
        empty: dict[str, Any] = {"modules": [], "parameters": 0, "ranks": [], "subparts": {}}
        row = rows.setdefault(part, empty)
        inner = row["subparts"].setdefault(sub, {"modules": 0, "parameters": 0})
        if module not in homes.setdefault(part, set()):
            homes[part].add(module)
            row["modules"].append(module)
            inner["modules"] += 1
        for held in (row, inner):
            held["parameters"] += prod(shape)
        if _RANKED.search(key) and shape and shape[0] not in row["ranks"]:
            row["ranks"] = sorted([*row["ranks"], shape[0]])
    ordered = {part: rows[part] for part in parts.names if part in rows}
    return {
        "folder": str(files.folder),
        "base": files.base,
        "method": str(files.config.get("peft_type", "unknown")).lower(),
        "ranks": sorted({rank for row in rows.values() for rank in row["ranks"]}),
        "parameters": sum(prod(shape) for shape in files.shapes.values()),
        "parts": ordered,
        "prompt": prompt,
        "unknown": unknown,
        "warnings": _warnings(files, ordered, unknown),
    }


def _warnings(files: AdapterFiles, rows: Mapping[str, Mapping[str, Any]], unknown: list[str]) -> list[str]:
    total = sum(len(row["modules"]) for row in rows.values())
    wanted = files.config.get("target_modules")
    said = f" (target_modules: {wanted if isinstance(wanted, str) else ', '.join(sorted(wanted))})" if wanted else ""
    found = [
        f"{len(rows[part]['modules'])} of the {total} adapted modules lie in the {tower}{said}"
        for part, tower in _TOWERS.items()
        if part in rows
    ]
    if unknown:
        found.append(f"{len(unknown)} of {len(files.shapes)} tensors name nothing in this model, such as {unknown[0]}")
    return found


class _Finder:
    """Module names of a model from the keys of an adapter."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._names = {name for name, _ in model.named_modules() if name}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._prefix = model.base_model_prefix
        self._mapping = get_model_conversion_mapping(model)

    def module(self, key: str) -> str | None:
        """The module a key adapts or replaces; None when no spelling names one."""
        match = _MARKER.search(key)
        name = key[: match.start()] if match else key.rpartition(".")[0]
        for spelling in self._spellings(name):
            if spelling in self._names:
                return spelling
        return None

    def _spellings(self, name: str) -> list[str]:
        """As written, without wrappers, renamed as an old checkpoint, with and without the base model's prefix."""
        bare = name
        while stripped := next((bare[len(w) :] for w in _WRAPPERS if bare.startswith(w)), None):
            bare = stripped
        found = [name, bare, self._renamed(bare)]
        if self._prefix:
            found += [f"{self._prefix}.{bare}", bare.removeprefix(f"{self._prefix}.")]
            found += [self._renamed(bare.removeprefix(f"{self._prefix}."))]
        return found

    def _renamed(self, name: str) -> str:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        key, _ = rename_source_key(f"{name}.weight", renamings, converters, self._prefix, self._shapes)
        return key.removesuffix(".weight")
