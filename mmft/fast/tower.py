"""What a frozen tower says of one row's pictures, alone: as flat tensors to store, and joined for a batch.

The answer is what the model's own `get_image_features` returns, without the tower's inner states; its tensors may be
lists over pictures (`pooler_output`), or lists over layers of lists over pictures (`deepstack_features`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmft.adapters.build import Adapted
from mmft.fast import native_build

FROZEN = ("vision", "projector")
"""Parts that an image's features depend on."""
_INNER = ("last_hidden_state", "hidden_states", "attentions")
_VERSION = 1


class Tower:
    """The frozen way from pixels to features of an adapted model; `autocast`: as a training step runs it."""

    def __init__(self, adapted: Adapted, *, autocast: bool) -> None:
        self.model = adapted.backbone.model
        self.parts = adapted.backbone.parts
        self.autocast = autocast
        self.takes = frozenset(inspect.signature(self.model.get_image_features).parameters)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Flat tensors of one row's pictures. No gradient, no draw of a random number."""
        where = next(self.model.parameters()).device
        placed = {}
        for name, value in inputs.items():
            placed[name] = value.to(where, self.model.dtype) if value.is_floating_point() else value.to(where)
        with torch.no_grad(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model.get_image_features(**placed, return_dict=True)
        found: dict[str, Tensor] = {}
        for name, value in out.items():
            if name not in _INNER:
                _flatten(name, value, found)
        return found

    def joined(self, rows: Sequence[Mapping[str, Tensor]]) -> Any:
        """The model output for a batch of rows, in their order, on the model's device."""
        where = next(self.model.parameters()).device
        trees = [_tree({name: value.to(where) for name, value in row.items()}) for row in rows]
        fields = {name: _join(name, [tree[name] for tree in trees]) for name in trees[0]}
        out = BaseModelOutputWithPooling(pooler_output=fields.pop("pooler_output"))
        for name, value in fields.items():
            setattr(out, name, value)
        return out

    def digest(self, processor: Any) -> str:
        """`space_of` the tower and the projector."""
        weights = [
            (name, value) for name, value in self.model.state_dict().items() if self.parts.part_of(name) in FROZEN
        ]
        return space_of(self.model, weights, processor=processor, autocast=self.autocast)


def space_of(model: Any, weights: Sequence[tuple[str, Any]], *, processor: Any = None, autocast: bool) -> str:
    """sha256 of all that a feature depends on beside its input: named weights in memory, config, processor, precision,
    attention, and the kernels that compute it. About a second for each gigabyte of weights."""
    told = hashlib.sha256()
    for name, value in sorted(weights, key=lambda one: one[0]):
        if isinstance(value, Tensor):
            told.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            told.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = model.config.to_dict()
    subs = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    where = next(model.parameters()).device.type
    held = {
        "version": _VERSION,
        "class": type(model).__name__,
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "attention": [getattr(sub, "_attn_implementation", None) for sub in subs],
        "processor": _described(processor),
        "precision": [str(model.dtype), autocast],
        "kernels": [torch.__version__, transformers.__version__, where, torch.get_num_threads()],
        "own kernels": native_build.digest() if native_build.chosen() is not None else None,
        "processor unit": torch.backends.cpu.get_cpu_capability() if where == "cpu" else torch.cuda.get_device_name(),
    }
    told.update(json.dumps(held, sort_keys=True, default=str).encode())
    return told.hexdigest()


def _described(processor: Any) -> list[str]:
    """Settings of the processor's parts; a tokenizer by its file, because pictures become tokens of it."""
    found = []
    parts: list[Any] = [processor, getattr(processor, "image_processor", None)]
    for part in parts:
        if hasattr(part, "to_dict"):
            plain = {name: value for name, value in part.to_dict().items() if not str(name).endswith("tokenizer")}
            found.append(json.dumps(plain, sort_keys=True, default=str))
    backend = getattr(getattr(processor, "tokenizer", None), "backend_tokenizer", None)
    found.append(hashlib.sha256(backend.to_str().encode()).hexdigest() if backend is not None else "")
    return found


def _flatten(path: str, value: Any, into: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        into[path] = value.detach()
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            _flatten(f"{path}/{number}", one, into)


def _tree(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The nested lists that `_flatten` made flat."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        name, *steps = path.split("/")
        if not steps:
            tree[name] = value
            continue
        here = tree.setdefault(name, [])
        for step in steps[:-1]:
            while len(here) <= int(step):
                here.append([])
            here = here[int(step)]
        here.append(value)
    return tree


def _join(name: str, values: Sequence[Any]) -> Any:
    """One field over rows: tensors along dim 0, pictures behind one another, of other lists (over layers) each entry by
    itself."""
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    if name == "pooler_output" or not isinstance(values[0], list):
        return [one for value in values for one in value]
    layers = zip(*values, strict=True)
    return [_join("pooler_output" if isinstance(layer[0], list) else "", layer) for layer in layers]
