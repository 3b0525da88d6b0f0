"""Recipes as text again, and what two recipes of one run may differ in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mmft.recipe.nodes import resolve_plain
from mmft.recipe.schema import Recipe

COSMETIC = (
    "name",
    "model.model_type",
    "train.output_dir",
    "train.logging_steps",
    "train.report_to",
    "train.save_steps",
    "train.save_total_limit",
    "train.dataloader_num_workers",
    "train.ddp_timeout",
    "train.fast",
    "train.packing",
    "evaluate",
    "export",
)
"""Fields (and sections) that a resumed run may change: they do not affect a trained number. (What `train.fast` and
`train.packing` come to on a model has its own entry in a run's identity.)"""


class _Dumper(yaml.SafeDumper):
    """Quotes each text that `resolve_plain` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "'" if not isinstance(resolve_plain(value), str) else None
    if any(char in value for char in "\r\x85\u2028\u2029"):
        style = '"'  # only this style escapes line breaks that YAML would fold into blanks
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(str, _text)
_Dumper.add_representer(float, _number)


def dump_recipe(recipe: Recipe) -> str:
    """YAML with all fields, defaults too; `load_recipe` reads an equal recipe from it.

    Data and model paths that exist below the working folder are made absolute, so that the text may be moved.
    """
    data = recipe.model_dump(mode="json")
    for source in (*data["data"]["train"], *data["data"]["eval"]):
        for key in ("path", "media_root"):
            source[key] = _absolute(source[key])
    data["adapter"]["init_from"] = _absolute(data["adapter"]["init_from"])
    data["model"]["name_or_path"] = _absolute(data["model"]["name_or_path"])
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def numbers(recipe: Recipe | Mapping[str, Any]) -> dict[str, Any]:
    """The fields that affect a trained number, flat (`train.seed` -> 0).

    Folders in front of data and model paths are left out: their content is guarded by fingerprints.
    """
    data = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    found: dict[str, Any] = {}
    _flatten(data, "", found)
    return {key: value for key, value in sorted(found.items()) if not _is_cosmetic(key)}


def _is_cosmetic(key: str) -> bool:
    return any(key == name or key.startswith(name + ".") for name in COSMETIC) or key.endswith(".media_root")


def _flatten(value: Any, prefix: str, found: dict[str, Any]) -> None:
    if isinstance(value, (Mapping, list, tuple)) and value:
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            _flatten(entry, f"{prefix}.{key}" if prefix else str(key), found)
        return
    value = list(value) if isinstance(value, tuple) else value
    if isinstance(value, str) and (prefix.endswith(".path") or prefix == "model.name_or_path"):
        value = Path(value).name if Path(value).is_absolute() else value
    found[prefix] = value


def recipe_digest(recipe: Recipe) -> str:
    """Hex sha256 of the canonical JSON of `numbers(recipe)`; equal digests train equal weights from equal data."""
    text = json.dumps(numbers(recipe), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_drift(old: Mapping[str, Any], new: Recipe) -> list[tuple[str, Any, Any]]:
    """What differs between a stored `model_dump(mode="json")` and `new`: (field, old, new), cosmetic fields left out.

    A field that only one side has counts as None on the other; a section that is new in `new` at its default does not
    count as drift.
    """
    before, after = numbers(old), numbers(new)
    return [
        (key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
