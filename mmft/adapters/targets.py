"""Targets: `language.attention, projector` -> exact module names. A target that matches nothing is an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from mmft.backbones.parts import PARTS, SUBPARTS, Parts
from mmft.errors import AdapterError, choices
from mmft.recipe.schema import AdapterSection, PartName

ALL_LINEAR = "all-linear"
"""Every linear layer of the language model, as elsewhere."""


@dataclass(frozen=True)
class Target:
    """Modules of one sub-part that are trained in the same way.

    `lora`: `modules` are the layers that get an adapter. `full`: the sub-part's own weights are trained (`modules` is
    empty here; `build_adapters` fills in the modules that are saved with the adapter).
    """

    part: str
    sub: str
    modules: tuple[str, ...]
    mode: Literal["lora", "full"] = "lora"


def resolve_targets(parts: Parts, adapter: AdapterSection) -> tuple[Target, ...]:
    """What is trained and how, in the order of `PARTS` and `SUBPARTS`, each sub-part once.

    Raises AdapterError when a target or a key of `adapter.parts` matches nothing, when a part has settings but is not
    trained, and when a target holds experts that no adapter can sit on.
    """
    wanted: set[tuple[str, str]] = set()
    for position, text in enumerate(adapter.targets):
        wanted |= _expand(parts, adapter, text, f"adapter.targets[{position}]")
    modes = _modes(parts, adapter, {part for part, _ in wanted})
    wanted |= {(part, sub) for part, mode in modes.items() if mode == "full" for sub in _trainable_subs(parts, part)}
    found = []
    for part in PARTS:
        for sub in SUBPARTS:
            mode = modes.get(part, "lora")
            if (part, sub) not in wanted or mode == "frozen":
                continue
            if adapter.method == "full" or mode == "full":
                found.append(Target(part, sub, (), "full"))
                continue
            if parts.linears(part, sub):
                found.append(Target(part, sub, tuple(parts.linears(part, sub))))
    if not found:
        raise AdapterError(
            "nothing is trained: every target's part is set to mode: frozen",
            where="adapter.parts",
            do="set one of the parts to mode: lora or mode: full",
        )
    return tuple(found)


def target_names(parts: Parts, *, full: bool = False) -> list[str]:
    """Everything a recipe may name as a target of this model: `part`, `part.sub` and `all-linear`."""
    names: list[str] = [ALL_LINEAR] if parts.linears("language") else []
    for part in parts.names:
        subs = [sub for sub in SUBPARTS if parts.linears(part, sub)] if not full else _trainable_subs(parts, part)
        if subs:
            names += [part, *(f"{part}.{sub}" for sub in subs)]
    return names


def _expand(parts: Parts, adapter: AdapterSection, text: str, where: str) -> set[tuple[str, str]]:
    part, _, sub = ("language", "", "") if text == ALL_LINEAR else text.partition(".")
    setting = adapter.parts.get(cast(PartName, part))
    full = adapter.method == "full" or (setting is not None and setting.mode == "full")
    allowed = target_names(parts, full=full)
    if not full:
        _refuse_experts(parts, part, sub, where)
    if text not in allowed:
        kind = "weights" if full else "linear layers"
        what = (
            f"target '{text}' matches nothing in this model"
            if part in parts.names
            else f"target '{text}' matches nothing: this model has no part '{part}'"
        )
        reason = f" (no {kind} there)" if part in parts.names and (not sub or sub in SUBPARTS) else ""
        raise AdapterError(
            what + reason, where=where, allowed=choices(allowed, word=text), do="run mmft inspect to see the parts"
        )
    subs = [sub] if sub else [s for s in SUBPARTS if f"{part}.{s}" in allowed]
    return {(part, s) for s in subs}


def _modes(parts: Parts, adapter: AdapterSection, targeted: set[str]) -> dict[str, str]:
    """part -> mode for the keys of `adapter.parts`."""
    modes: dict[str, str] = {}
    for part, setting in adapter.parts.items():
        if part not in parts.names:
            raise AdapterError(
                f"this model has no part '{part}'",
                where=f"adapter.parts.{part}",
                allowed=choices(parts.names, word=part),
                do="remove the key",
            )
        if setting.mode == "lora" and part not in targeted:
            raise AdapterError(
                f"part '{part}' has settings but is not trained",
                where=f"adapter.parts.{part}",
                allowed="a part named in adapter.targets, or mode: full, or mode: frozen",
                do=f"add {part} to adapter.targets, or remove the key",
            )
        modes[part] = setting.mode
    return modes


def _trainable_subs(parts: Parts, part: str) -> list[str]:
    """Sub-parts of `part` that have modules."""
    return [sub for sub in SUBPARTS if any(s == sub and parts.part_of(name) == part for name, s in parts.subs.items())]


def _refuse_experts(parts: Parts, part: str, sub: str, where: str) -> None:
    held = [name for name, home in parts.experts.items() if home[0] == part and sub in ("", home[1])]
    if held:
        free = [name for name in target_names(parts) if name.startswith(f"{part}.") and name != f"{part}.{sub}"]
        raise AdapterError(
            f"target '{part}{'.' if sub else ''}{sub}' holds experts that are stored as one three-dimensional weight "
            f"({held[0]} and {len(held) - 1} more): LoRA on them is not supported",
            where=where,
            allowed=choices(free),
            do=f"target {part}.attention instead",
        )
