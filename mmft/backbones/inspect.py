"""What a model consists of, without reading a weight: built on the meta device, full size, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmft.backbones.load import Backbone, meta_backbone, meta_model
from mmft.backbones.parts import SUBPARTS, Parts, find_parts, owners, size
from mmft.errors import AdapterError, choices
from mmft.recipe.schema import ModelSection


def inspect_model(name_or_path: str, revision: str | None = None, targets: Sequence[str] = ()) -> dict[str, Any]:
    """Parts, counts and layer names of a hub id, a folder, `shipped:NAME` or a bare model type (`qwen2_vl`, with its
    default config).

    `parameters` counts tied weights once; `targets` are the module names that the given targets mean.
    Raises BackboneError for what is no vision-language model, AdapterError for a target that matches nothing.
    """
    model = meta_model(name_or_path)
    if model is None:
        backbone: Backbone = meta_backbone(ModelSection(name_or_path=name_or_path, revision=revision))
        model, parts = backbone.model, backbone.parts
    else:
        parts = find_parts(model)
    rows = describe(model, parts)
    return {
        "model_type": model.config.model_type,
        "parameters": sum(row["parameters"] for row in rows.values()),
        "parts": rows,
        "targets": match_targets(parts, targets),
    }


def describe(model: Any, parts: Parts) -> dict[str, dict[str, Any]]:
    """part -> its top-level prefixes, parameters, linear layers, and the same by sub-part."""
    rows: dict[str, dict[str, Any]] = {
        part: {
            "modules": _tops(model, parts, part),
            "parameters": 0,
            "linears": parts.linears(part),
            "subparts": {sub: {"parameters": 0, "linears": len(parts.linears(part, sub))} for sub in SUBPARTS},
        }
        for part in parts.names
    }
    for name, (part, parameter) in owners(model, parts).items():
        rows[part]["parameters"] += size(parameter)
        rows[part]["subparts"][parts.subpart_of(name)]["parameters"] += size(parameter)
    for row in rows.values():
        row["subparts"] = {sub: n for sub, n in row["subparts"].items() if n["parameters"] or n["linears"]}
    return rows


def match_targets(parts: Parts, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `part`, `part.sub` or `all-linear` mean, each once, in the order asked for."""
    able = [part for part in parts.names if parts.linears(part)]
    names: list[str] = []
    for text in targets:
        part, _, sub = ("language", "", "") if text == "all-linear" else text.partition(".")
        found = parts.linears(part, sub or None)
        if not found:
            allowed = choices([*able, *(f"{p}.{s}" for p in able for s in SUBPARTS if parts.linears(p, s))], word=text)
            raise AdapterError(
                f"target '{text}' matches nothing in this model",
                where="--targets",
                allowed=allowed,
                do="run mmft inspect without targets to see the parts",
            )
        names += [name for name in found if name not in names]
    return names


def _tops(model: Any, parts: Parts, part: str) -> list[str]:
    """The fewest module names that together hold the whole part and nothing else (a lone weight by its own name)."""
    homes = {name: parts.part_of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    tops: list[str] = []
    for name, _ in model.named_modules(remove_duplicate=False):
        held = [home for owned, home in homes.items() if not name or owned.startswith(f"{name}.")]
        if held and set(held) == {part} and not any(name.startswith(f"{top}.") for top in tops):
            tops.append(name)
    loose = [name for name, home in homes.items() if home == part and not any(name.startswith(f"{t}.") for t in tops)]
    return tops + loose
