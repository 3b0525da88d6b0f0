"""Selectors: `language.attention` -> exact module names. The one place that expands them.

    homes(parts, "vision")                       -> [("vision", "attention"), ("vision", "mlp"), ...]
    select(parts, "language.mlp")                -> names of linear layers, in the model's order
    experts(parts, "language.mlp")               -> names of three-dimensional expert weights under the same selector
    select(parts, "vision", layers="last:8", exclude=("vision.mlp", "*.fc2"))
    keep_layers(parts, names, "0-3,7")           -> the layer filter alone
    drop(parts, names, ("head", "q_proj"))       -> the exclusion alone
    layer_numbers(parts)                         -> {linear layer: (stack, layer number)}
    selectors(parts)                             -> every selector that hits something in this model

A selector is `part`, `part.sub` or `all-linear` (every linear layer of the language model, as in peft).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from mmft.backbones.parts import PARTS, SUBPARTS, Parts
from mmft.errors import AdapterError, choices

ALL_LINEAR = "all-linear"
LAYERED = ("vision", "audio", "cross_attention", "language")
"""Parts that the layer filter works on; a projector or a head is short and taken whole, a Q-Former too."""
LAYERS_FORM = "last:8, first:4, or numbers from 0 such as 0-3,7"

_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


def selectors(parts: Parts) -> list[str]:
    """Every selector that hits a linear layer or a stack of experts in this model."""
    names = [ALL_LINEAR] if _able(parts, "language") else []
    for part in parts.names:
        if subs := _able(parts, part):
            names += [part, *(f"{part}.{sub}" for sub in subs)]
    return names


def homes(parts: Parts, text: str, *, where: str = "--targets") -> list[tuple[str, str]]:
    """The (part, sub-part) pairs a selector means, those with layers to hit. Raises AdapterError when there is none."""
    part, _, sub = ("language", "", "") if text == ALL_LINEAR else text.partition(".")
    subs = [found for found in _able(parts, part) if sub in ("", found)]
    if subs:
        return [(part, found) for found in subs]
    known = part in parts.names
    what = (
        f"target '{text}' matches nothing in this model"
        if known
        else f"target '{text}' matches nothing: this model has no part '{part}'"
    )
    raise AdapterError(
        what + (" (no linear layers there)" if known and (not sub or sub in SUBPARTS) else ""),
        where=where,
        allowed=choices(selectors(parts), word=text),
        do="run mmft inspect to see the parts",
    )


def select(
    parts: Parts,
    text: str,
    *,
    layers: str | None = None,
    exclude: Sequence[str] = (),
    where: str = "--targets",
) -> list[str]:
    """Names of the linear layers that a selector hits, in the model's order; empty when it hits only stacked experts.

    `layers` and `exclude` as in `keep_layers` and `drop`. Raises AdapterError when the selector matches nothing in
    the model, or nothing is left of what it matched.
    """
    wanted = set(homes(parts, text, where=where))
    found = [name for name, home in parts.linear.items() if home in wanted]
    left = found
    if layers is not None:
        left = keep_layers(parts, left, layers)
    if exclude:
        left = drop(parts, left, exclude)
    if found and not left:
        raise AdapterError(
            f"nothing is left of target '{text}' ({len(found)} linear layers) after "
            + " and ".join(
                [f"layers: {layers}"] * (layers is not None) + [f"exclude: {', '.join(exclude)}"] * bool(exclude)
            ),
            where=where,
            do="take the target away, or select less narrowly",
        )
    return left


def experts(parts: Parts, text: str) -> list[str]:
    """Names of the parameters under a selector that hold a stack of experts (three dimensions)."""
    part, _, sub = ("language", "", "") if text == ALL_LINEAR else text.partition(".")
    return [name for name, home in parts.experts.items() if home[0] == part and sub in ("", home[1])]


def layer_numbers(parts: Parts) -> dict[str, tuple[str, int]]:
    """Linear layer -> (stack, number of the transformer layer it lies in); those that lie in no layer are left out.

    A stack is named with its own numbers starred (`model.visual.blocks`, `encoder.stages.*.blocks`), its layers are
    numbered from 0 through all of it. A layer is the innermost numbered module that holds attention, else the
    outermost numbered one (state-space and convolution layers between attention layers).
    """
    places = {item: (stack, number) for stack, items in _stacks(parts).items() for number, item in enumerate(items)}
    return {name: places[item] for name in parts.linear if (item := _item(parts, name))}


def keep_layers(parts: Parts, names: Sequence[str], layers: str, *, where: str = "adapter.layers") -> list[str]:
    """Those of `names` that lie in the given layers: `last:8`, `first:4`, or numbers from 0 (`0-3,7`).

    Counted in every stack of layers by itself; names of parts without a filter (`LAYERED`) are kept, names of the
    others that lie in no layer are not. Raises AdapterError for another form and for numbers that no stack has.
    """
    stacks = _stacks(parts)
    touched = {_stack(item) for name in names if (item := _item(parts, name)) and parts.part_of(name) in LAYERED}
    allowed = {stack: _numbers(layers, len(stacks[stack]), where) for stack in touched}
    deepest = max((len(stacks[stack]) for stack in touched), default=0)
    if touched and not any(allowed.values()):
        raise AdapterError(
            f"no layer is meant by layers: {layers}",
            where=where,
            allowed=f"{LAYERS_FORM}; this model has layers 0 to {deepest - 1} there",
            do="choose layers that the model has",
        )
    chosen = {stacks[stack][number] for stack, numbers in allowed.items() for number in numbers}
    return [name for name in names if parts.part_of(name) not in LAYERED or _item(parts, name) in chosen]


def drop(parts: Parts, names: Sequence[str], exclude: Iterable[str], *, where: str = "adapter.exclude") -> list[str]:
    """`names` without what is excluded: a part, `part.sub`, or a glob over module names.

    A glob is compared with the whole name and with its end (`q_proj`, `layers.0.*`, `*.experts.*`); a module that it
    matches goes with all that lies inside. Raises AdapterError for an exclusion that matches nothing in the model.
    """
    left = list(names)
    for text in exclude:
        part, _, sub = text.partition(".")
        if part in PARTS and (not sub or sub in SUBPARTS):
            if part not in parts.names:
                raise _useless(parts, text, where)
            left = [name for name in left if not _in_home((parts.part_of(name), parts.subpart_of(name)), part, sub)]
            continue
        matched = {name for name in parts.subs if name and _matches(name, text)}
        if not matched:
            raise _useless(parts, text, where)
        left = [name for name in left if not any(step in matched for step in _steps(name))]
    return left


def _able(parts: Parts, part: str) -> list[str]:
    """Sub-parts of `part` with linear layers or stacked experts."""
    found = {sub for home, sub in (*parts.linear.values(), *parts.experts.values()) if home == part}
    return [sub for sub in SUBPARTS if sub in found]


def _in_home(home: tuple[str, str], part: str, sub: str) -> bool:
    return home[0] == part and sub in ("", home[1])


def _steps(name: str) -> list[str]:
    """The name and all that it lies in, outermost first."""
    steps = name.split(".")
    return [".".join(steps[: end + 1]) for end in range(len(steps))]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _useless(parts: Parts, text: str, where: str) -> AdapterError:
    names = [name for part in parts.names for name in (part, *(f"{part}.{sub}" for sub in _able(parts, part)))]
    return AdapterError(
        f"exclude '{text}' matches nothing in this model",
        where=where,
        allowed=choices(names, word=text) + "; or a glob over module names such as *.q_proj",
        do="take it away, or run mmft inspect to see the names",
    )


def _item(parts: Parts, name: str) -> str | None:
    """The module that is the layer around `name`."""
    attending = parts.attending
    numbered = [step for step in _steps(name) if step.rpartition(".")[2].isdigit()]
    inner = [step for step in numbered if step in attending]
    if inner:
        return inner[-1]
    outer = [step for step in numbered if parts.subs.get(step) == "other"]
    return outer[0] if outer else None


def _stack(item: str) -> str:
    steps = item.split(".")[:-1]
    return ".".join("*" if step.isdigit() else step for step in steps)


def _stacks(parts: Parts) -> dict[str, list[str]]:
    """stack -> its layers, in the model's order."""
    found: dict[str, dict[str, None]] = {}
    for name in parts.linear:
        if item := _item(parts, name):
            found.setdefault(_stack(item), {}).setdefault(item)
    return {stack: list(items) for stack, items in found.items()}


def _numbers(layers: str, depth: int, where: str) -> list[int]:
    """Layer numbers below `depth` that a filter means."""
    side, colon, amount = layers.replace(" ", "").partition(":")
    if colon and side in ("first", "last") and amount.isdigit() and int(amount) > 0:
        count = min(int(amount), depth)
        return list(range(count)) if side == "first" else list(range(depth - count, depth))
    found: set[int] = set()
    for span in side.split(","):
        match = _SPAN.fullmatch(span)
        if colon or match is None or int(match[2] or match[1]) < int(match[1]):
            raise AdapterError(
                f"layers: {layers} is not understood",
                where=where,
                allowed=LAYERS_FORM,
                do="write the layers in one of these forms",
            )
        found |= set(range(int(match[1]), min(int(match[2] or match[1]) + 1, depth)))
    return sorted(found)
