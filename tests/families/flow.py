"""What each linear layer reads, seen from outside: which inputs change when the picture changes, which when the text.

An oracle for `mmft.backbones.parts` that uses no name and no config: three runs of the model with hooks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tests.families.tiny import Tiny, special_tokens

_MASK = re.compile(r"mask|position|grid|size|length|ratio|bool")
_TEXT = re.compile(r"(^|_)(input_ids|tokens)$")
PROTEIN = re.compile(r"protein_(input_ids|ids)$")


def media_names(tiny: Tiny) -> list[str]:
    """Inputs that hold pixels or sound: real numbers that are no mask, and what `Tiny.other` replaces."""
    named = set(tiny.other or ())
    return [
        name
        for name, value in tiny.inputs.items()
        if name in named or PROTEIN.search(name) or (value.is_floating_point() and not _MASK.search(name))
    ]


def other_picture(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The inputs with other pictures (or sound)."""
    changed = tiny.inputs | (tiny.other or {})
    source = torch.Generator().manual_seed(11)
    for name in media_names(tiny):
        value = tiny.inputs[name]
        if name in (tiny.other or ()):
            continue
        if value.is_floating_point():
            changed[name] = -value + 0.5 * torch.randn(value.shape, generator=source, dtype=torch.float32)
            if name == "flattened_patches":
                changed[name][..., :2] = value[..., :2]  # row and column of the patch
        else:
            changed[name] = torch.where(value > 4, (value + 3) % 17 + 5, value)
    return changed


def other_text(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The inputs with other words: every token that the config does not name, moved on by one plain token."""
    special = torch.tensor(sorted(special_tokens(tiny.config) | set(range(5))))
    changed = dict(tiny.inputs)
    for name, value in tiny.inputs.items():
        if _TEXT.search(name) and not PROTEIN.search(name) and not value.is_floating_point():
            plain = sorted(set(value[~torch.isin(value, special)].tolist()))
            following = dict(zip(plain, plain[1:] + plain[:1], strict=True))
            moved = torch.tensor([following.get(item, item) for item in value.flatten().tolist()])
            sound = (tiny.other or {}).get(name, value) != value  # codes of a sound among the words
            changed[name] = torch.where(sound, value, moved.view_as(value))
    return changed


def reads(model: Any, names: Iterable[str], tiny: Tiny) -> dict[str, tuple[bool, bool]]:
    """Layer -> (its input depends on the picture, its input depends on the text); layers that did not run are missing.

    `model` is in eval mode; the tensors compared are the layers' inputs, bit by bit.
    """
    names = list(names)
    base = _seen(model, names, tiny.inputs, tiny.call)
    picture = _seen(model, names, other_picture(tiny), tiny.call)
    text = _seen(model, names, other_text(tiny), tiny.call)
    return {name: (_differ(base[name], picture.get(name)), _differ(base[name], text.get(name))) for name in base}


def _seen(model: Any, names: list[str], inputs: Mapping[str, torch.Tensor], call: str) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], torch.Tensor):
                found.setdefault(name, []).append(given[0].detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        with torch.no_grad():
            torch.manual_seed(0)  # some models draw noise in their forward pass
            model.get_submodule(call)(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _differ(one: list[torch.Tensor], other: list[torch.Tensor] | None) -> bool:
    if other is None or len(one) != len(other):
        return True
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(one, other, strict=True))
