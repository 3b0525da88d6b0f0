"""Targets: `language.attention, projector` -> exact module names. A target that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from mmft.backbones.parts import PARTS, SUBPARTS, Parts
from mmft.backbones.selectors import ALL_LINEAR, drop, experts, homes, keep_layers, selectors
from mmft.errors import AdapterError, choices
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection, PartName

__all__ = ["ALL_LINEAR", "Target", "narrow", "resolve_targets", "target_names"]


@dataclass(frozen=True)
class Target:
    """Modules of one sub-part that are trained in the same way.

    `lora`: by `adapter.method`; `modules` are the modules that get an adapter, `parameters` the stacked experts.
    `full`: the sub-part's own weights are trained. `modules` is empty for `full` and for methods that do not sit on
    linear layers; `build_adapters`, which has the model, fills it in.
    """

    part: str
    sub: str
    modules: tuple[str, ...]
    mode: Literal["lora", "full"] = "lora"
    parameters: tuple[str, ...] = ()


def resolve_targets(parts: Parts, adapter: AdapterSection) -> tuple[Target, ...]:
    """What is trained and how, in the order of `PARTS` and `SUBPARTS`, each sub-part once.

    Raises AdapterError when a target, an exclusion, a layer or a key of `adapter.parts` matches nothing, when a part
    has settings but is not trained, and when a target holds experts that the method cannot sit on.
    """
    if METHODS[adapter.method].place == "prompt":
        return (Target("language", "embedding", ()),)
    wanted: set[tuple[str, str]] = set()
    for position, text in enumerate(adapter.targets):
        wanted |= _expand(parts, adapter, text, f"adapter.targets[{position}]")
    modes = _modes(parts, adapter, {part for part, _ in wanted})
    wanted |= {(part, sub) for part, mode in modes.items() if mode == "full" for sub in _trainable_subs(parts, part)}
    saved = _saved(parts, adapter)
    found = []
    for part in PARTS:
        for sub in SUBPARTS:
            mode = modes.get(part, "lora")
            whole = saved.get((part, sub))
            if whole is not None:
                found.append(Target(part, sub, whole, "full"))
            if (part, sub) in wanted and mode != "frozen":
                if whole == () and mode != "full":
                    raise _both(part, sub)
                if whole != ():
                    full = adapter.method == "full" or mode == "full"
                    found += _targets(parts, adapter, (part, sub), full=full, without=whole or ())
    if not found:
        raise AdapterError(
            "nothing is trained: every target's part is set to mode: frozen, or excluded",
            where="adapter.parts",
            do="set one of the parts to mode: lora or mode: full",
        )
    return tuple(found)


def narrow(parts: Parts, names: Sequence[str], adapter: AdapterSection) -> list[str]:
    """Module (or parameter) names that `adapter.layers` and `adapter.exclude` leave over."""
    left = keep_layers(parts, names, adapter.layers) if adapter.layers is not None else list(names)
    homely = [text for text in adapter.exclude if _is_home(text)]
    for text in homely:
        part, _, sub = text.partition(".")
        if part not in parts.names:
            drop(parts, [], [text])  # raises
        left = [n for n in left if parts.part_of(n) != part or sub not in ("", parts.subpart_of(n))]
    return drop(parts, left, [text for text in adapter.exclude if text not in homely])


def target_names(parts: Parts, *, full: bool = False) -> list[str]:
    """Everything a recipe may name as a target of this model: `part`, `part.sub` and `all-linear`."""
    if not full:
        return selectors(parts)
    names: list[str] = [ALL_LINEAR] if parts.linears("language") else []
    for part in parts.names:
        if subs := _trainable_subs(parts, part):
            names += [part, *(f"{part}.{sub}" for sub in subs)]
    return names


def _is_home(text: str) -> bool:
    part, _, sub = text.partition(".")
    return part in PARTS and (not sub or sub in SUBPARTS)


def _both(part: str, sub: str) -> AdapterError:
    return AdapterError(
        f"'{part}.{sub}' is to get an adapter and to be trained whole",
        where="adapter.modules_to_save",
        do=f"take {part} out of adapter.targets, or out of modules_to_save",
    )


def _targets(
    parts: Parts, adapter: AdapterSection, home: tuple[str, str], *, full: bool, without: Sequence[str]
) -> list[Target]:
    part, sub = home
    if full:
        return [] if without else [Target(part, sub, (), "full")]
    if METHODS[adapter.method].place != "linears":
        return [Target(part, sub, ())]
    free = [n for n in parts.linears(part, sub) if not any(n == top or n.startswith(f"{top}.") for top in without)]
    modules = narrow(parts, free, adapter)
    stacks = narrow(parts, experts(parts, f"{part}.{sub}"), adapter)
    if stacks:
        _refuse_experts(parts, adapter, home, stacks)
    return [Target(part, sub, tuple(modules), parameters=tuple(stacks))] if modules or stacks else []


def _expand(parts: Parts, adapter: AdapterSection, text: str, where: str) -> set[tuple[str, str]]:
    part, _, sub = ("language", "", "") if text == ALL_LINEAR else text.partition(".")
    setting = adapter.parts.get(cast(PartName, part))
    place = METHODS[adapter.method].place
    whole = place in ("weights", "norms", "biases") or (setting is not None and setting.mode == "full")
    if not whole:
        return set(homes(parts, text, where=where))
    allowed = target_names(parts, full=True)
    if text not in allowed:
        what = (
            f"target '{text}' matches nothing in this model"
            if part in parts.names
            else f"target '{text}' matches nothing: this model has no part '{part}'"
        )
        reason = " (no weights there)" if part in parts.names and (not sub or sub in SUBPARTS) else ""
        raise AdapterError(
            what + reason, where=where, allowed=choices(allowed, word=text), do="run mmft inspect to see the parts"
        )
    subs = [sub] if sub else [s for s in SUBPARTS if f"{part}.{s}" in allowed]
    return {(part, s) for s in subs if place != "norms" or s == "norm"}


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


def _saved(parts: Parts, adapter: AdapterSection) -> dict[tuple[str, str], tuple[str, ...]]:
    """(part, sub-part) -> modules of `adapter.modules_to_save`; no modules means the whole sub-part."""
    found: dict[tuple[str, str], list[str]] = {}
    whole: set[tuple[str, str]] = set()
    for position, text in enumerate(adapter.modules_to_save):
        part, _, sub = text.partition(".")
        if _is_home(text):
            subs = [s for s in _trainable_subs(parts, part) if sub in ("", s)] if part in parts.names else []
            whole |= {(part, s) for s in subs}
        else:
            subs = [name for name in parts.subs if name == text or name.endswith(f".{text}")]
            for name in subs:
                found.setdefault((parts.part_of(name), parts.subpart_of(name)), []).append(name)
        if not subs:
            raise AdapterError(
                f"module '{text}' is not in this model",
                where=f"adapter.modules_to_save[{position}]",
                allowed=choices(target_names(parts, full=True), word=text) + "; or the end of a module's name",
                do="run mmft inspect to see the parts and the names",
            )
    return {home: () if home in whole else tuple(found[home]) for home in (*whole, *found)}


def _trainable_subs(parts: Parts, part: str) -> list[str]:
    """Sub-parts of `part` that have modules."""
    return [sub for sub in SUBPARTS if any(s == sub and parts.part_of(name) == part for name, s in parts.subs.items())]


def _refuse_experts(parts: Parts, adapter: AdapterSection, home: tuple[str, str], stacks: list[str]) -> None:
    """peft puts LoRA on three-dimensional weights (`target_parameters`), and nothing else."""
    reasons = {
        f"method {adapter.method} cannot sit on it": adapter.method != "lora",
        "peft has no DoRA for it": adapter.use_dora,
        "peft has no dropout for it": adapter.lora_dropout > 0,
        f"init_lora_weights: {adapter.init_lora_weights} needs a matrix": adapter.init_lora_weights != "default",
    }
    hit = [reason for reason, broken in reasons.items() if broken]
    if not hit:
        return
    part, sub = home
    free = [name for name in target_names(parts) if name.startswith(f"{part}.") and name != f"{part}.{sub}"]
    raise AdapterError(
        f"target '{part}.{sub}' holds experts that are stored as one three-dimensional weight "
        f"({stacks[0]} and {len(stacks) - 1} more): {hit[0]}",
        where="adapter.targets",
        allowed=choices(free),
        do=f"target {part}.attention instead, or use plain LoRA without dropout",
    )
