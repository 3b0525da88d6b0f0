"""What a model consists of, without reading a weight: built on the meta device, full size, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmft.backbones.adapter_parts import describe_adapter, read_adapter
from mmft.backbones.load import Backbone, meta_backbone, meta_model
from mmft.backbones.parts import SUBPARTS, Parts, find_parts, owners, size
from mmft.backbones.selectors import experts, select
from mmft.errors import BackboneError
from mmft.recipe.schema import ModelSection


def inspect_model(
    name_or_path: str | None,
    revision: str | None = None,
    targets: Sequence[str] = (),
    *,
    layers: str | None = None,
    exclude: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Parts, counts and layer names of a hub id, a folder, `shipped:NAME` or a bare model type (`qwen2_vl`, with its
    default config), and by its parts an adapter folder.

    `parameters` counts tied weights once; `targets` are the module names that the given targets mean (see
    `backbones.selectors` for `layers` and `exclude`), `experts` the stacked expert weights among them. Without a name
    the adapter's own base is taken. Raises BackboneError for what transformers has no model class for, AdapterError
    for a target that matches nothing and for a folder that is no adapter.
    """
    files = read_adapter(Path(adapter)) if adapter is not None else None
    name = name_or_path or (files.base if files else None)
    if not name:
        raise BackboneError(
            "no model is named" + (" and the adapter does not name its base" if files else ""),
            where=str(adapter or "mmft inspect"),
            allowed="a folder, a hub id, shipped:NAME, or a model type",
            do="name the model: mmft inspect BASE" + (" --adapter FOLDER" if files else ""),
        )
    model = meta_model(name)
    if model is None:
        backbone: Backbone = meta_backbone(ModelSection(name_or_path=name, revision=revision))
        model, parts = backbone.model, backbone.parts
    else:
        parts = find_parts(model)
    rows = describe(model, parts)
    wanted = [text for given in targets for text in given.split(",") if text]
    found = {
        "model_type": model.config.model_type,
        "class": type(model).__name__,
        "parameters": sum(row["parameters"] for row in rows.values()),
        "parts": rows,
        "targets": match_targets(parts, wanted, layers=layers, exclude=exclude),
        "experts": list(dict.fromkeys(name for text in wanted for name in experts(parts, text))),
    }
    return found | ({"adapter": describe_adapter(model, parts, files)} if files else {})


def describe(model: Any, parts: Parts) -> dict[str, dict[str, Any]]:
    """part -> its top-level prefixes, parameters, linear layers, and counts by sub-part."""
    rows: dict[str, dict[str, Any]] = {
        part: {
            "modules": _tops(model, parts, part),
            "parameters": 0,
            "linears": parts.linears(part),
            "subparts": {
                sub: {"parameters": 0, "modules": 0, "linears": len(parts.linears(part, sub))} for sub in SUBPARTS
            },
        }
        for part in parts.names
    }
    for name, (part, parameter) in owners(model, parts).items():
        rows[part]["parameters"] += size(parameter)
        rows[part]["subparts"][parts.subpart_of(name)]["parameters"] += size(parameter)
    for name, sub in parts.subs.items():
        if name and (part := parts.part_of(name)) in rows:
            rows[part]["subparts"][sub]["modules"] += 1
    for row in rows.values():
        row["subparts"] = {sub: n for sub, n in row["subparts"].items() if n["parameters"] or n["linears"]}
    return rows


def match_targets(
    parts: Parts, targets: Sequence[str], *, layers: str | None = None, exclude: Sequence[str] = ()
) -> list[str]:
    """Names of the linear layers that the targets mean, each once, in the order asked for."""
    found: dict[str, None] = {}
    for text in targets:
        found.update(dict.fromkeys(select(parts, text, layers=layers, exclude=exclude)))
    return list(found)


def _tops(model: Any, parts: Parts, part: str) -> list[str]:
    """The fewest module names that together hold the whole part and nothing else (a lone weight by its own name)."""
    homes = {name: parts.part_of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    tops: list[str] = []
    for name, _ in model.named_modules(remove_duplicate=False):
        held = [home for owned, home in homes.items() if name and owned.startswith(f"{name}.")]
        if held and set(held) == {part} and not any(name.startswith(f"{top}.") for top in tops):
            tops.append(name)
    loose = [name for name, home in homes.items() if home == part and not any(name.startswith(f"{t}.") for t in tops)]
    return tops + loose
