"""Runtime name <-> checkpoint name, by the very rules transformers loads with.

In transformers 5 a parameter's name in memory (`model.language_model.layers.0…`) is not its name on disk
(`language_model.model.layers.0…`). `NameMap` renames every key of a folder as `from_pretrained` would (see
`transformers.core_model_loading.convert_and_load_state_dict_in_model`), for a model on the meta device.
"""

from __future__ import annotations

import contextlib
import re
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

from mmft.backbones import classes
from mmft.errors import BackboneError, ExportError
from mmft.export.shards import Entry, view


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` rows of a checkpoint tensor that are, in the same order, rows of a runtime tensor (see `shards.view`)."""

    key: str
    row: int
    target: str
    target_row: int
    count: int


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
    disk: dict[str, tuple[int, ...]] = field(repr=False, default_factory=dict)  # shapes of all checkpoint tensors
    _segments: dict[str, tuple[Segment, ...] | None] = field(repr=False, default_factory=dict)

    def module(self, name: str) -> str | None:
        """The runtime name of a module that an adapter calls `name` (runtime or older checkpoint spelling)."""
        for candidate in (name, self._renamed(f"{name}.weight").removesuffix(".weight"), self._in_decoder(name)):
            with contextlib.suppress(AttributeError):
                self.model.get_submodule(candidate)
                return candidate
        return None

    def _in_decoder(self, name: str) -> str:
        """A text-only model's name (`model.layers.0…`) inside the language model of one that has more parts."""
        decoder = None
        with contextlib.suppress(NotImplementedError, AttributeError):
            decoder = self.model.get_decoder()
        prefix = next((n for n, module in self.model.named_modules() if n and module is decoder), "")
        return f"{prefix}.{name.removeprefix('model.')}"

    def tables(self) -> frozenset[str]:
        """Runtime names of the parameters that have a row per token: input embeddings and head."""
        ends = []
        for ask in (self.model.get_input_embeddings, self.model.get_output_embeddings):
            with contextlib.suppress(NotImplementedError, AttributeError):  # as upstream says that there is none
                ends += [end] if (end := ask()) is not None else []
        found = [name for name, module in self.model.named_modules() if any(module is end for end in ends)]
        return frozenset(f"{name}.{leaf}" for name in found for leaf in ("weight", "bias"))

    def segments(self, group: Group) -> tuple[Segment, ...] | None:
        """How the rows of a group's checkpoint tensors lie in memory, None when whole rows do not stay together."""
        if group.first not in self._segments:
            self._segments[group.first] = _segments(group, self)
        return self._segments[group.first]

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

    def before(self, name: str) -> str:
        """The name of a runtime parameter before transformers 4.52: the oldest spelling that the loader understands."""
        reverse = _renamings(entry.reverse_transform() for entry in reversed(_renamings(self.mapping)))
        found = [self.home.get(name, name), apply_renamings(name, reverse)]
        tower = re.sub(r"(^|\.)(vision_tower)\.(?!vision_model\.)", r"\1\2.vision_model.", found[0])
        for key in (tower, *found):
            if key != name and self._renamed(key) == name:
                return key
        return name

    def _renamed(self, key: str) -> str:
        return _rename(key, self.mapping, self.model, shapes=self.shapes)[0]


def model_class(folder: Path) -> Any:
    """The class of a folder's config.json: the one training loads, else one for text alone.

    Where `architectures` names a model without its head (`LlavaModel`), the image-text one, which may have been
    trained on such a folder and knows its names too. Raises ExportError when transformers has no class for it.
    """
    config = _config(folder)
    with contextlib.suppress(BackboneError):
        found = classes.model_class(config)
        mapping = transformers.AutoModel._model_mapping
        headless = type(config) in mapping and mapping[type(config)] is found
        with_head = transformers.AutoModelForImageTextToText
        return with_head if headless and type(config) in with_head._model_mapping else found
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
    return _on_meta(model_class(folder), _config(folder))


def left_ties(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """The ties that the folder's model has when its config.json holds `values`."""
    config = type(_config(folder)).from_dict(values)
    return dict(getattr(_on_meta(model_class(folder), config), "all_tied_weights_keys", None) or {})


def _on_meta(kind: Any, config: Any) -> PreTrainedModel:
    build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    with torch.device("meta"):
        return build(config)


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
    disk = {key: entry.shape for key, entry in entries.items()}
    return NameMap(model, runtime, home, groups, tuple(unused), ties, shapes, mapping, disk)


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


def _segments(group: Group, names: NameMap) -> tuple[Segment, ...] | None:
    """Sends row numbers instead of weights through the loader's converter and looks where they come out."""
    if any(len(names.disk[key]) not in (1, 2, 3) for key in group.keys):
        return None
    numbers: dict[str, torch.Tensor] = {}
    starts: list[tuple[int, str]] = []
    total = 0
    for key in group.keys:
        shape = names.disk[key]
        rows = view(shape, stacked=True)[0]
        numbers[key] = (
            torch.arange(total, total + rows).view(*shape[:-1], 1)
            if len(shape) > 1
            else torch.arange(total, total + rows)
        )
        starts.append((total, key))
        total += rows
    try:
        found = load_group(group, numbers, names.model)
    except (RuntimeError, ValueError, NotImplementedError, KeyError, AttributeError, TypeError, IndexError):
        return None
    segments: list[Segment] = []
    for target, values in found.items():
        shape = names.shapes.get(target, ())
        wanted = (*shape[:-1], 1) if len(shape) > 1 else shape
        if tuple(values.shape) != wanted or values.dtype != torch.int64:
            return None
        flat = values.reshape(-1)
        cuts = [0, *((flat[1:] != flat[:-1] + 1).nonzero().view(-1) + 1).tolist(), len(flat)]
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            segments += _runs(target, first, int(flat[first]), last - first, starts=starts)
    whole = sum(segment.count for segment in segments) == total
    widths = all(names.disk[s.key][-1:] == names.shapes[s.target][-1:] or len(names.disk[s.key]) == 1 for s in segments)
    distinct = len({(s.key, s.row) for s in segments}) == len(segments)
    return tuple(segments) if whole and widths and distinct else None


def _runs(target: str, row: int, number: int, count: int, *, starts: list[tuple[int, str]]) -> list[Segment]:
    """A run of row numbers, cut where one checkpoint tensor ends and the next begins."""
    found = []
    bounds = [*(start for start, _ in starts), number + count]
    for place, (start, key) in enumerate(starts):
        first, last = max(number, start), min(number + count, max(bounds[place + 1], start))
        if place == len(starts) - 1:
            last = number + count
        if first < last:
            found.append(Segment(key, first - start, target, row + first - number, last - first))
    return found


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
