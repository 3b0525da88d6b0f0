"""What an adapter folder does to each parameter: opening the folder, and a home for every tensor in it.

The arithmetic of each method stands in `deltas/`, in peft's own order of operations with adapters in float32, so that
the result has the bits of `merge_and_unload`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from mmft.adapters.folder import TRAINED
from mmft.errors import ExportError, Problem
from mmft.export.deltas import ia3, lora_sites, lycoris, rotation
from mmft.export.deltas.base import DAMAGED, WHOLE, Adapter, Homeless, Site, Step
from mmft.export.deltas.plain import TOKENS, Replace, token_step
from mmft.export.foreign import Spelling, spellings, split_key
from mmft.export.names import NameMap
from mmft.export.shards import Weights, row_blocks

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Fields of any method that say how an adapter was trained or found, not what its tensors mean. Any other field that
# has not its default value makes the merge refuse: a new kind of a method must not be merged as the ordinary one.
_HARMLESS = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save"}
    | {"trainable_token_indices", "token_indices", "init_weights"}
)
_NO_WEIGHTS = "adds vectors to the input of the layers, so no weight of the base can hold it"
NOT_MERGEABLE = {
    "PROMPT_TUNING": _NO_WEIGHTS,
    "PREFIX_TUNING": _NO_WEIGHTS,
    "P_TUNING": _NO_WEIGHTS,
    "MULTITASK_PROMPT_TUNING": _NO_WEIGHTS,
    "CPT": _NO_WEIGHTS,
    "CARTRIDGE": _NO_WEIGHTS,
    "ADAPTION_PROMPT": _NO_WEIGHTS,
    "BOTTLENECK": "puts a non-linear layer into the model, which no weight of the base can hold",
    "XLORA": "mixes its adapters anew for each token",
    "POLY": "mixes its adapters by task",
}


@dataclass(frozen=True)
class Family:
    """One method: the names of its tensors, the config fields that the merge understands, and its steps."""

    parts: tuple[str, ...]
    fields: frozenset[str]
    steps: Callable[[Site, list[Site]], list[tuple[str, Step]]]


def _alone(steps: Callable[[Site], list[tuple[str, Step]]]) -> Callable[[Site, list[Site]], list[tuple[str, Step]]]:
    return lambda site, _: steps(site)


FAMILIES: dict[str, Family] = {
    "LORA": Family(lora_sites.LORA_PARTS, lora_sites.LORA_FIELDS, _alone(lora_sites.lora_steps)),
    "ADALORA": Family(lora_sites.ADALORA_PARTS, lora_sites.ADALORA_FIELDS, _alone(lora_sites.adalora_steps)),
    "VERA": Family(lora_sites.VERA_PARTS, lora_sites.VERA_FIELDS, lora_sites.vera_steps),
    "IA3": Family(ia3.PARTS, ia3.FIELDS, _alone(ia3.steps)),
    "OFT": Family(rotation.OFT_PARTS, rotation.OFT_FIELDS, _alone(rotation.oft_steps)),
    "BOFT": Family(rotation.BOFT_PARTS, rotation.BOFT_FIELDS, _alone(rotation.boft_steps)),
    "LOHA": Family(lycoris.LOHA_PARTS, lycoris.LOHA_FIELDS, _alone(lycoris.loha_steps)),
    "LOKR": Family(lycoris.LOKR_PARTS, lycoris.LOKR_FIELDS, _alone(lycoris.lokr_steps)),
    "LN_TUNING": Family((), frozenset(), _alone(token_step)),
    "TRAINABLE_TOKENS": Family((), frozenset(), _alone(token_step)),
}


PLAIN = "TRAINED_WEIGHTS"
"""Not a type of peft's: a folder of weights of the base that were trained themselves (`full`, `bitfit`)."""


@dataclass(frozen=True)
class Update:
    """All that happens to one parameter, in order. `on_disk` names a tensor of the checkpoint, not one in memory."""

    name: str
    steps: tuple[Step, ...]
    on_disk: bool = False
    shape: tuple[int, ...] | None = field(default=None)  # the new one, where the adapter brings a resized table

    @property
    def keys(self) -> tuple[str, ...]:
        """Adapter tensors it uses."""
        return tuple(key for step in self.steps for key in step.keys)

    @property
    def replaced(self) -> bool:
        """Whether nothing of the base's values is left."""
        return isinstance(self.steps[0], Replace)

    @property
    def stacked(self) -> bool:
        """Whether rows are those of the second axis (experts)."""
        return any(isinstance(step, lora_sites.Experts) for step in self.steps)

    @property
    def kind(self) -> str:
        """A word for the report."""
        return "+".join(dict.fromkeys(step.kind for step in self.steps))


def open_adapter(folder: Path) -> Adapter:
    """Read the config and the header of a peft folder; check that all values are finite (one pass, streamed).

    A folder with `trained_weights.safetensors` and no adapter config holds new values for weights of the base.
    Raises ExportError for a method that no weight can hold, an option that the merge does not know, or NaN and Inf.
    """
    if (folder / TRAINED).is_file() and not (folder / CONFIG).exists():
        adapter = Adapter(PLAIN, {}, Weights([folder / TRAINED]), folder)
    else:
        method, options = _read_config(folder)
        if not (folder / WEIGHTS).is_file():
            pickle = folder / "adapter_model.bin"
            raise ExportError(
                f"{WEIGHTS} is missing" + (f" ({pickle.name} is a pickle, which is not read)" * pickle.exists()),
                where=str(folder),
                do="give the folder save_pretrained of peft wrote, with safe_serialization",
            )
        adapter = Adapter(method, options, Weights([folder / WEIGHTS]), folder)
    weights = adapter.weights
    bad = []
    for name, entry in weights.entries.items():
        for start, stop in row_blocks(entry):
            if entry.dtype.is_floating_point and not torch.isfinite(weights.read(name, start, stop).float()).all():
                bad.append(name)
                break
    if bad:
        weights.close()
        raise ExportError(
            f"the adapter holds NaN or Inf in {len(bad)} of {len(weights.entries)} tensors: {some(bad)}",
            where=str(weights.entries[bad[0]].file),
            do="take an earlier checkpoint of the run; nothing was written",
        )
    return adapter


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_bytes())
        method = str(raw["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{CONFIG} cannot be read: {error}", where=str(path), do=DAMAGED) from error
    where = f"{path}, peft_type"
    if method in NOT_MERGEABLE:
        raise ExportError(
            f"an adapter of type {method} is not mergeable: it {NOT_MERGEABLE[method]}",
            where=where,
            allowed=", ".join(FAMILIES),
            do="serve the base with the adapter (peft's from_pretrained, or mmft generate with the adapter folder)",
        )
    if method not in FAMILIES:
        raise ExportError(
            f"an adapter of type {method} cannot be merged by streaming",
            where=where,
            allowed=", ".join(FAMILIES),
            do="merge it with peft's merge_and_unload, if that method can be merged at all",
        )
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[method]  # type: ignore[index]
    defaults = {item.name: _default(item) for item in dataclasses.fields(kind)}
    known = _HARMLESS | FAMILIES[method].fields
    odd = [name for name, value in raw.items() if name not in known and value not in (defaults.get(name), None, False)]
    if odd:
        word = "LoRA" if method == "LORA" else method
        raise ExportError(
            Problem(
                f"a {word} adapter with {name} = {raw[name]!r} cannot be merged by streaming",
                where=f"{path}, {name}",
                do=WHOLE,
            )
            for name in odd
        )
    return method, {**defaults, **raw}


def _default(item: dataclasses.Field[object]) -> object:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def resolve_updates(adapter: Adapter, names: NameMap) -> dict[str, Update]:
    """Parameter name -> what happens to it; ExportError listing every adapter tensor without a home.

    Keys may carry what other tools and older versions put around a module's name (see `foreign.py`).
    """
    family = _family(adapter)
    plain: dict[str, str] = {}  # runtime parameter -> key of its new values
    modules: dict[tuple[str, bool, int], Site] = {}
    shared: dict[str, str] = {}
    homeless: list[str] = []
    for key in adapter.weights.entries:
        module, part = split_key(key, (*family.parts, TOKENS))
        if part is None:
            name = _parameter(names, spellings(module))
            if name is None or name in plain:
                homeless.append(key)
            else:
                plain[name] = key
        elif module == "":
            shared[part] = key
        else:
            found = _module(names, spellings(module))
            site = modules.setdefault(found[0], _site(adapter, names, *found)) if found else None
            if site is None or part in site.parts:
                homeless.append(key)
            else:
                site.parts[part] = key
    steps: dict[tuple[str, bool], list[Step]] = {}
    sites = list(modules.values())
    for (_, on_disk, _), site in modules.items():
        own = dict(site.parts)
        site.parts.update(shared)
        try:
            fitting = token_step(site) if TOKENS in own else family.steps(site, sites)
            for name, step in fitting:
                steps.setdefault((name, on_disk), []).append(step)
        except Homeless:
            homeless.extend(own.values())
    updates, wrong = _gather(adapter, names, plain, steps)
    homeless.extend(wrong)
    used = {key for update in updates.values() for key in update.keys}
    homeless.extend(key for key in adapter.weights.entries if key not in used and key not in homeless)
    if homeless:
        raise ExportError(
            f"{len(homeless)} of {len(adapter.weights.entries)} adapter tensors have no home in the base: "
            + some(sorted(homeless)),
            where=str(adapter.folder),
            do="merge into the base this adapter was trained on; nothing was written",
        )
    return updates


def _family(adapter: Adapter) -> Family:
    return FAMILIES.get(adapter.method) or Family((), frozenset(), _alone(token_step))


def module_of_keys(adapter: Adapter, names: NameMap) -> dict[str, tuple[str, str, str]]:
    """Adapter key -> (runtime module, tensor of it, wrappers between them); the module is empty for shared tensors.

    Raises ExportError for a key that is a module in the checkpoint's layout only, or nowhere.
    """
    parts = (*_family(adapter).parts, TOKENS)
    found: dict[str, tuple[str, str, str]] = {}
    for key in adapter.weights.entries:
        module, part = split_key(key, parts)
        if part is None and (name := _parameter(names, spellings(module))) is not None:
            owner, _, leaf = name.rpartition(".")
            found[key] = owner, leaf, ""
        elif part is not None and not module:
            found[key] = "", part, ""
        elif part is not None and (where := _module(names, spellings(module))) is not None and not where[0][1]:
            token = "token_adapter." if ".token_adapter." in key else ""
            found[key] = where[0][0], token + part, ".base_layer" * where[0][2]
        else:
            raise ExportError(
                f"{key} belongs to no module of the model in memory",
                where=str(adapter.folder),
                do="give the base this adapter was trained on, or keep the adapter's layout",
            )
    return found


def _gather(
    adapter: Adapter, names: NameMap, plain: dict[str, str], steps: dict[tuple[str, bool], list[Step]]
) -> tuple[dict[str, Update], list[str]]:
    """Values put in place come first, then what is added to them; keys whose shapes do not fit are handed back."""
    tables = names.tables()
    updates: dict[str, Update] = {}
    wrong: list[str] = []
    for name, key in plain.items():
        new, old = adapter.shape(key), names.shapes[name]
        resized = new if new != old else None
        if resized and (name not in tables or new[1:] != old[1:]):
            wrong.append(key)
        else:
            updates[name] = Update(name, (Replace(key),), shape=resized)
    for (name, on_disk), found in steps.items():
        before = updates.get(name)
        first = before.steps if before else ()
        update = Update(name, (*first, *found), on_disk, before.shape if before else None)
        shape = update.shape or (names.disk[name] if on_disk else names.shapes[name])
        if any(isinstance(step, lora_sites.Lora) and step.shape != shape for step in found):
            wrong.extend(update.keys)
        else:
            updates[name] = update
    grown = {name: update.shape[0] for name, update in updates.items() if update.shape}
    for name in sorted(tables & names.shapes.keys() - grown.keys()) if grown else ():
        if names.ties.get(name) not in grown and not any(names.ties.get(other) == name for other in grown):
            raise ExportError(
                f"the adapter brings {', '.join(grown)} with {max(grown.values())} rows, but nothing for {name}, "
                f"which has {names.shapes[name][0]}",
                where=str(adapter.folder),
                do="save it with both tables (peft leaves out a resized head that is no target of its own)",
            )
    return updates, wrong


def _site(adapter: Adapter, names: NameMap, where: tuple[str, bool, int], spelled: str) -> Site:
    module, on_disk, depth = where
    layer = None if on_disk else names.model.get_submodule(module)
    return Site(adapter, module, spelled, layer, {}, names.disk if on_disk else names.shapes, depth)


def _module(names: NameMap, found: list[Spelling]) -> tuple[tuple[str, bool, int], str] | None:
    """The module a key speaks of: in memory, else one that exists in the checkpoint's layout only."""
    for spelling in found:
        if (module := names.module(spelling.name)) is not None:
            return (module, False, spelling.depth), spelling.name
    for spelling in found:
        if spelling.depth == 0 and f"{spelling.name}.weight" in names.disk:
            return (spelling.name, True, 0), spelling.name
    return None


def _parameter(names: NameMap, found: list[Spelling]) -> str | None:
    return next((name for spelling in found if (name := names.parameter(spelling.name)) is not None), None)


def some(names: list[str], limit: int = 8) -> str:
    """The first few of a list, and how many more."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
