"""Runtime name <-> checkpoint name, by the very rules transformers loads with.

In transformers 5 a parameter's name in memory (`model.language_model.layers.0…`) is not its name on disk
(`language_model.model.layers.0…`). `NameMap` renames every key of a folder as `from_pretrained` would (see
`transformers.core_model_loading.convert_and_load_state_dict_in_model`), for a model on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from mmft.errors import ExportError
from mmft.export.shards import Entry


@dataclass(frozen=True)
class Group:
    """Checkpoint tensors that the loader converts together (a fused qkv that is split, experts that are stacked)."""

    first: str  # runtime name by which the loader keeps the group
    keys: tuple[str, ...]  # checkpoint keys, in loading order
    patterns: tuple[str, ...]  # the source pattern each key matched
    inner: tuple[str, ...]  # each key after the plain renamings, before the converter
    converter: WeightConverter = field(repr=False)
    targets: tuple[str, ...] = ()  # runtime names; empty when the shapes could not be followed


@dataclass(frozen=True)
class NameMap:
    """How the tensors of one model folder are called in memory."""

    model: PreTrainedModel = field(repr=False)
    runtime: dict[str, str]  # checkpoint key -> runtime name, for those that are only renamed
    home: dict[str, str]  # the same, turned round
    groups: tuple[Group, ...]
    unused: tuple[str, ...]  # checkpoint keys the loader would not use
    ties: dict[str, str]  # runtime name -> the runtime name it shares its tensor with, when only one is on disk
    shapes: dict[str, tuple[int, ...]]  # of everything in the runtime state dict
    mapping: list[Any] = field(repr=False)  # transformers' transforms, which remember whether this folder needed them

    def module(self, name: str) -> str | None:
        """The runtime name of a module that an adapter calls `name` (runtime or older checkpoint spelling)."""
        for spelling in (lambda: name, lambda: self._renamed(f"{name}.weight").removesuffix(".weight")):
            with contextlib.suppress(AttributeError):
                self.model.get_submodule(candidate := spelling())
                return candidate
        return None

    def parameter(self, name: str) -> str | None:
        """The runtime name of a parameter or buffer, from the runtime or an older checkpoint spelling."""
        if name in self.shapes:
            return name
        renamed = self._renamed(name)
        return renamed if renamed in self.shapes else None

    def new_key(self, name: str) -> str:
        """A checkpoint key that the loader would give to the runtime name `name`, which the base has not on disk."""
        reverse = [entry.reverse_transform() for entry in reversed(self.mapping) if entry.was_used()]
        for key in (apply_renamings(name, _renamings(reverse)), name):
            if key not in self.runtime and self._renamed(key) == name:
                return key
        raise ExportError(f"no checkpoint name was found for {name}", do="merge with peft's merge_and_unload")

    def _renamed(self, key: str) -> str:
        return _rename(key, self.mapping, self.model, shapes=self.shapes)[0]


def model_class(folder: Path) -> Any:
    """The class (or auto class) of a folder's config.json: the image-text one, else its `architectures`.

    In this order because a tower-only `architectures` (`LlavaModel`) may still be trained with its head on.
    """
    config = _config(folder)
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto
    raise ExportError(
        f"no model class for {config.model_type} with architectures {config.architectures}",
        where=str(folder),
        do="give a folder of a model that transformers implements",
    )


def meta_model(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json with weights on the meta device; ExportError when there is no such class."""
    kind = model_class(folder)
    build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    with torch.device("meta"):
        return build(_config(folder))


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"config.json cannot be used: {error}", where=str(folder), do="restore the base folder's config.json"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(
            "the base folder holds quantized weights, into which nothing can be merged",
            where=str(folder / "config.json"),
            do="give the folder with the original 16 or 32 bit weights",
        )
    return config


def map_names(model: PreTrainedModel, entries: Mapping[str, Entry]) -> NameMap:
    """Rename all keys of `entries` as the loader would, for `model` (on the meta device)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mapping = get_model_conversion_mapping(model)
    runtime: dict[str, str] = {}
    unused: list[str] = []
    collected: dict[str, list[tuple[str, str, str]]] = {}
    for key in sorted(entries, key=dot_natural_key):
        name, pattern = _rename(key, mapping, model, shapes=shapes)
        if name not in shapes:
            unused.append(key)
        elif pattern is not None:
            collected.setdefault(name, []).append((key, pattern, apply_renamings(key, _renamings(mapping))))
        else:
            runtime[key] = name
    groups = tuple(
        _group(first, members, mapping, model=model, entries=entries) for first, members in collected.items()
    )
    home: dict[str, str] = {}
    for key, name in runtime.items():
        if name in home:
            raise ExportError(
                f"{home[name]} and {key} are both loaded as {name}",
                where=str(entries[key].file),
                do="merge with peft's merge_and_unload",
            )
        home[name] = key
    known = {*home, *(target for group in groups for target in group.targets)}
    ties: dict[str, str] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target not in known and source in known:
            ties[target] = source
        elif source not in known and target in known:
            ties[source] = target
    return NameMap(model, runtime, home, groups, tuple(unused), ties, shapes, mapping)


def _renamings(mapping: Iterable[Any]) -> list[WeightRenaming]:
    return [entry for entry in mapping if isinstance(entry, WeightRenaming)]


def _rename(
    key: str, mapping: list[Any], model: PreTrainedModel, *, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, str | None]:
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    name, pattern = rename_source_key(key, _renamings(mapping), converters, model.base_model_prefix, shapes)
    if name not in shapes and key in shapes:
        name, pattern = rename_source_key(key, [], [], model.base_model_prefix, shapes)
    return name, pattern


def _group(
    first: str,
    members: list[tuple[str, str, str]],
    mapping: list[Any],
    *,
    model: PreTrainedModel,
    entries: Mapping[str, Entry],
) -> Group:
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    # The last one with the pattern, as the loader's own dictionary has it.
    converter = {pattern: entry for entry in converters for pattern in entry.source_patterns}[members[0][1]]
    keys, patterns, inner = zip(*members, strict=True)
    group = Group(first, keys, patterns, inner, converter)
    empty = {key: torch.empty(entries[key].shape, dtype=entries[key].dtype, device="meta") for key in keys}
    try:
        targets = tuple(load_group(group, empty, model))
    except (RuntimeError, ValueError, NotImplementedError, KeyError, AttributeError, TypeError):
        targets = (first,)  # its values need real tensors; touched, it is refused by name
    return Group(first, keys, patterns, inner, converter, targets)


def load_group(group: Group, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of a group -> runtime tensors, by the loader's converter."""
    converter = deepcopy(group.converter)
    for key, pattern in zip(group.keys, group.patterns, strict=True):
        converter.add_tensor(group.first, key, pattern, _now(tensors[key]))
    realized = converter.convert(group.first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in realized.items()}


def save_group(group: Group, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Runtime tensors of a group -> checkpoint tensors, by the reverse converter; ExportError if keys are left."""
    reverse: Any = group.converter.reverse_transform()
    first = None
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = reverse.rename_source_key(name)
        if pattern is None:
            raise ExportError(
                f"{name} cannot be written back in the base's layout ({group.converter})",
                do="merge with peft's merge_and_unload",
            )
        first = first or renamed
        reverse.add_tensor(renamed, name, pattern, _now(tensors[name]))
    realized = reverse.convert(first or group.first, model=model, config=model.config)
    plain = {name: value[0] if isinstance(value, list) else value for name, value in realized.items()}
    missing = sorted(set(group.inner) - plain.keys())
    if missing or len(plain) != len(group.keys):
        raise ExportError(
            f"{', '.join(missing or group.keys)} cannot be rebuilt from the memory layout",
            do="merge with peft's merge_and_unload",
        )
    return {key: plain[inner] for key, inner in zip(group.keys, group.inner, strict=True)}


def _now(tensor: torch.Tensor) -> Any:
    # the converter takes futures, or callables that it calls when it needs the tensor
    return lambda: tensor
