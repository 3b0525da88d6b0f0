"""What stands beside the weights in a model folder: copied files, and config.json with what changed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmft.export.produce import Producer
from mmft.export.shards import Output
from mmft.files import write_json

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
_NEEDED = ("spk_dict.pt",)  # speakers of Qwen2.5-Omni, without which its class does not load; copied, never read
_NOT_COPIED = ("merge_report.json", "MANIFEST.json", "config.json")


def copy_files(base: Path, folder: Path) -> None:
    """Copy tokenizer, processor and the like; no weights, no code, no hidden files."""
    below = [*(base / "additional_chat_templates").glob("*.jinja")]
    below += [path for name in _modalities(base) for path in (base / name).glob("*")]
    for path in sorted((*base.iterdir(), *below)):
        plain = not path.name.startswith(".") and path.suffix not in (".py", ".pyc") and path.name not in _NOT_COPIED
        wanted = path.name in _NEEDED or not path.name.endswith(_WEIGHT_SUFFIXES)
        if plain and path.is_file() and wanted:
            target = folder / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)  # not its mode, and the file itself where a hub cache has a link


def _modalities(base: Path) -> list[str]:
    """Folders of a fusion model's processor: one for each modality."""
    path = base / "processor_config.json"
    found = json.loads(path.read_bytes()).get("modalities") if path.is_file() else None
    return [name for name in found if str(name).isidentifier()] if isinstance(found, dict) else []


def write_config(
    base: Path, folder: Path, producer: Producer, *, untie: bool, dtype: str | None, outputs: Sequence[Output]
) -> None:
    """Write config.json with the type, the ties and the vocabulary that the merged weights have."""
    config = json.loads((base / "config.json").read_bytes())
    if dtype is not None or not (config.get("dtype") or config.get("torch_dtype")):
        sizes: dict[str, int] = {}
        for output in outputs:
            if output.dtype.is_floating_point:
                name = str(output.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + output.nbytes
        set_dtype(config, dtype or max(sizes, key=lambda name: sizes[name], default="float32"))
    for update in producer.updates.values():
        if update.shape is not None:
            _resize(config, producer.names.shapes[update.name][0], update.shape[0])
    if untie:
        config = untied_config(config)
    write_json(folder / "config.json", config)


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write the type of the weights into a config and those of its parts that state one."""
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            set_dtype(value, dtype)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype


def _resize(config: dict[str, Any], old: int, new: int) -> None:
    """State the new vocabulary wherever the old one stands."""
    if config.get("vocab_size") == old:
        config["vocab_size"] = new
    for value in config.values():
        if isinstance(value, dict):
            _resize(value, old, new)


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same config for a model that shares no tables."""
    config = copy.deepcopy(config)
    _untie(config)
    config["tie_word_embeddings"] = False
    return config


def _untie(config: dict[str, Any]) -> None:
    if config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict):
            _untie(value)
    if isinstance(config.get("text_config"), dict):
        config["text_config"]["tie_word_embeddings"] = False  # its class may tie by default
