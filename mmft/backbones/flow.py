"""Parts by data flow: which modules see only pixels or sound, and where their width becomes the language model's.

The last source of `find_parts`, for a model that neither has accessors nor a config that tells of its towers. It needs
real weights and an example of the inputs, and costs three forward passes and two copies of every output;
the structural sources cost milliseconds and none of that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mmft.backbones.roots import Names, ask, inside

_SOUND = re.compile(r"audio|speech|input_features|input_values", re.IGNORECASE)
_NO_MEDIA = re.compile(r"mask|position|embeds")


def flow_roots(model: Any, names: Names, inputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Root -> `vision`, `audio` or `projector` for the largest modules that see media and no text.

    A module sees media alone when its output changes with the media input and not with the tokens. Among those, one
    without a stack of layers whose output is as wide as the token table is a projector, the others are towers.
    Empty for a model without media inputs or tokens.
    """
    media = [name for name, value in inputs.items() if value.is_floating_point() and not _NO_MEDIA.search(name)]
    table = ask(model, "get_input_embeddings")
    width = getattr(table, "embedding_dim", None)
    if not media or "input_ids" not in inputs or width is None:
        return {}
    base, order = _outputs(model, names, inputs)
    text = dict(inputs) | {"input_ids": _other_tokens(inputs["input_ids"])}
    by_text = _changed(base, _outputs(model, names, text)[0])
    found: dict[str, str] = {}
    for name in media:
        part = "audio" if _SOUND.search(name) else "vision"
        other, _ = _outputs(model, names, dict(inputs) | {name: -inputs[name] + 0.5})
        alone = [module for module in order if module in _changed(base, other) and module not in by_text]
        largest = [m for m in alone if not any(m != o and inside(m, o) for o in alone)]
        for module in largest:
            layered = any(isinstance(child, nn.ModuleList) for child in names.modules[module].modules())
            is_bridge = not layered and base[module].shape[-1] == width
            found.setdefault(module, "projector" if is_bridge else part)
    return found


def _outputs(model: Any, names: Names, inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """First output tensor of every module with weights, and the order in which they were first left."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            value = output
            while value is not None and not isinstance(value, torch.Tensor):
                value = next(iter(value.values() if hasattr(value, "values") else value), None)
            if value is not None:
                kept.setdefault(name, value.detach().clone())

        return hook

    owning = [(n, m) for n, m in names.modules.items() if n and next(m.parameters(), None) is not None]
    hooks = [module.register_forward_hook(keep(name)) for name, module in owning]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return kept, list(kept)


def _changed(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, value in one.items() if name in other and not torch.equal(value, other[name])}


def _other_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """The last token of every row becomes the first one's; placeholders of media stand where they stood."""
    changed = tokens.clone()
    changed[:, -1] = torch.where(tokens[:, -1] == tokens[:, 0], (tokens[:, -1] + 1) % 8, tokens[:, 0])
    return changed
