"""What an adapter folder does to each parameter: `W' = W + s B A`, in peft's own order of operations.

LoRA: Hu et al. 2021 (arXiv 2106.09685); `s = alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023); DoRA:
Liu et al. 2024 (arXiv 2402.09353). The order of operations is that of `peft.tuners.lora.layer` with adapters in
float32, so that the result has the bits of `merge_and_unload`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.errors import ExportError, Problem
from mmft.export.names import NameMap
from mmft.export.shards import Weights, row_blocks

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Kind = Literal["linear", "conv1d", "conv2d", "embedding"]
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"^(?P<module>.+)\.(?:(?P<part>lora_[AB])\.(?P<leaf>weight|bias)"
    r"|(?P<embedding>lora_embedding_[AB])|(?P<dora>lora_magnitude_vector)(?:\.weight)?)$"
)
# Fields that say how an adapter was trained or found, not what its tensors mean. Any other field that has not its
# default value makes the merge refuse: a new kind of LoRA must not be merged as an ordinary one.
_HARMLESS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "use_dora",
        "velora_config",
        "runtime_config",
        "lora_bias",
        "ensure_weight_tying",
        "qalora_group_size",
    }
)


@dataclass(frozen=True)
class Lora:
    """The factors of one module, as keys of the adapter file."""

    kind: Kind
    a: str  # (r, in), embedding (r, rows), convolution (r, in, kh, kw)
    b: str  # (out, r), convolution (out, r, 1, 1)
    rank: int
    scaling: float
    magnitude: str | None = None  # DoRA's (out,)


@dataclass(frozen=True)
class Update:
    """All that happens to one runtime parameter: first `replace`, then the delta or the bias."""

    name: str
    replace: str | None = None
    lora: Lora | None = None
    bias: tuple[str, float] | None = None  # adapter key and scaling of a LoRA bias

    @property
    def keys(self) -> tuple[str, ...]:
        """Adapter keys it uses."""
        lora = (self.lora.a, self.lora.b, self.lora.magnitude) if self.lora else ()
        return tuple(key for key in (self.replace, *lora, self.bias[0] if self.bias else None) if key)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter folder."""

    config: LoraConfig
    weights: Weights = field(repr=False)
    folder: Path

    def factor(self, key: str) -> torch.Tensor:
        """A tensor of the file in float32, as peft loads it."""
        return self.weights.read(key).to(torch.float32)


def open_adapter(folder: Path) -> Adapter:
    """Read the config and the header of a peft folder; check that all values are finite (one pass, streamed).

    Raises ExportError for another method than LoRA, an option that a delta cannot express, or NaN and Inf.
    """
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ExportError(
            f"{WEIGHTS} is missing", where=str(folder), do="give the folder save_pretrained of peft wrote"
        )
    weights = Weights([folder / WEIGHTS])
    bad = []
    for name, entry in weights.entries.items():
        for start, stop in row_blocks(entry):
            if entry.dtype.is_floating_point and not torch.isfinite(weights.read(name, start, stop).float()).all():
                bad.append(name)
                break
    if bad:
        weights.close()
        raise ExportError(
            f"the adapter holds NaN or Inf in {len(bad)} of {len(weights.entries)} tensors: {_some(bad)}",
            where=str(folder / WEIGHTS),
            do="take an earlier checkpoint of the run; nothing was written",
        )
    return Adapter(config, weights, folder)


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_bytes())
        kind = str(raw["peft_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{CONFIG} cannot be read: {error}", where=str(path), do="give the adapter folder as peft or mmft wrote it"
        ) from error
    if kind != "LORA":
        raise ExportError(
            f"an adapter of type {kind} cannot be merged by streaming",
            where=f"{path}, peft_type",
            allowed="LORA (with rslora, DoRA on linear layers, biases and modules_to_save)",
            do="merge it with peft's merge_and_unload, if that method can be merged at all",
        )
    defaults = {item.name: _default(item) for item in dataclasses.fields(LoraConfig)}
    odd = [
        name for name, value in raw.items() if name not in _HARMLESS and value not in (defaults.get(name), None, False)
    ]
    if odd:
        raise ExportError(
            Problem(
                f"a LoRA adapter with {name} = {raw[name]!r} cannot be merged by streaming",
                where=f"{path}, {name}",
                do="merge it with peft's merge_and_unload",
            )
            for name in odd
        )
    names = {item.name for item in dataclasses.fields(LoraConfig) if item.init} & _HARMLESS
    given = {
        name: raw[name] for name in names & raw.keys() if name not in ("runtime_config", "loftq_config", "peft_type")
    }
    for name in ("eva_config", "corda_config", "lora_ga_config", "velora_config", "init_lora_weights", "auto_mapping"):
        given.pop(name, None)  # nested; they speak of the start and of the backward pass
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"{CONFIG} is not a LoRA config: {error}",
            where=str(path),
            do="give the adapter folder as peft or mmft wrote it",
        ) from error


def _default(item: dataclasses.Field[object]) -> object:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def resolve_updates(adapter: Adapter, names: NameMap) -> dict[str, Update]:
    """Runtime parameter name -> what happens to it; ExportError listing every adapter tensor without a home."""
    updates: dict[str, Update] = {}
    factors: dict[str, dict[str, str]] = {}
    homeless: list[str] = []
    for key in adapter.weights.entries:
        plain = key.removeprefix(_PREFIX)
        match = _LORA.match(plain)
        if match is None:
            name = names.parameter(plain.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
            if name is None or name in updates or names.shapes[name] != adapter.weights.entries[key].shape:
                homeless.append(key)
            else:
                updates[name] = Update(name, replace=key)
            continue
        module = names.module(match["module"])
        part = match["dora"] or match["embedding"] or f"{match['part']}.{match['leaf']}"
        if module is None or part in factors.setdefault(module, {}):
            homeless.append(key)
        else:
            factors[module][part] = key
    for module, parts in factors.items():
        try:
            for update in _module_updates(adapter, names, module, parts):
                base = updates.get(update.name, update)
                updates[update.name] = replace(update, replace=base.replace)
        except _Homeless:
            homeless.extend(parts.values())
    used = [key for update in updates.values() for key in update.keys]
    homeless.extend(key for key in adapter.weights.entries if key not in used and key not in homeless)
    if homeless:
        raise ExportError(
            f"{len(homeless)} of {len(adapter.weights.entries)} adapter tensors have no home in the base: "
            + _some(sorted(homeless)),
            where=str(adapter.folder / WEIGHTS),
            do="merge into the base this adapter was trained on; nothing was written",
        )
    return updates


class _Homeless(Exception):
    """The factors of a module do not fit it."""


def _module_updates(adapter: Adapter, names: NameMap, module: str, parts: dict[str, str]) -> list[Update]:
    layer = names.model.get_submodule(module)
    kind = _kind(layer, module)
    embedding = kind == "embedding"
    a = parts.get("lora_embedding_A" if embedding else "lora_A.weight")
    b = parts.get("lora_embedding_B" if embedding else "lora_B.weight")
    weight = f"{module}.weight"
    if a is None or b is None or weight not in names.shapes:
        raise _Homeless
    rank = adapter.weights.entries[a].rows
    if _delta_shape(kind, adapter.weights.entries[a].shape, adapter.weights.entries[b].shape) != names.shapes[weight]:
        raise _Homeless
    magnitude = parts.get("lora_magnitude_vector")
    if bool(adapter.config.use_dora) != (magnitude is not None) or (magnitude and kind != "linear"):
        raise ExportError(
            f"DoRA on {module} ({type(layer).__name__}) cannot be merged by streaming",
            where=str(adapter.folder),
            allowed="DoRA on linear layers, each with its lora_magnitude_vector",
            do="merge it with peft's merge_and_unload",
        )
    scaling = scaling_of(adapter.config, module, rank)
    updates = [Update(weight, lora=Lora(kind, a, b, rank, scaling, magnitude))]
    if "lora_B.bias" in parts:
        if f"{module}.bias" not in names.shapes:
            raise ExportError(
                f"{module} has a LoRA bias, but the base layer has none",
                where=str(adapter.folder),
                do="give the adapter folder as peft or mmft wrote it",
            )
        updates.append(Update(f"{module}.bias", bias=(parts["lora_B.bias"], scaling)))
    return updates


def scaling_of(config: LoraConfig, module: str, rank: int) -> float:
    """`alpha / r`, with the patterns of the config; `alpha / sqrt(r)` for rsLoRA."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    ranks = config.rank_pattern or {}
    stated = ranks.get(get_pattern_key(list(ranks), module), config.r)
    if stated != rank:
        raise ExportError(
            f"{module}: the adapter's tensors have rank {rank}, its config says {stated}",
            do="give the adapter folder as peft or mmft wrote it",
        )
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _kind(layer: nn.Module, module: str) -> Kind:
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return "conv2d"
    for kind, cls in (("linear", nn.Linear), ("conv1d", Conv1D), ("embedding", nn.Embedding)):
        if isinstance(layer, cls):
            return kind  # type: ignore[return-value]
    text = f" with {layer.groups} groups" if isinstance(layer, nn.Conv2d) else ""
    raise ExportError(
        f"LoRA on {module} ({type(layer).__name__}{text}) cannot be merged by streaming",
        allowed="Linear, Conv1D, Embedding, Conv2d with one group",
        do="merge with peft's merge_and_unload",
    )


def _delta_shape(kind: Kind, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    if kind == "conv2d":
        fits = len(a) == len(b) == 4 and b[1:] == (a[0], 1, 1)
        return (b[0], *a[1:]) if fits else None
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return None
    return (b[0], a[1]) if kind == "linear" else (a[1], b[0])


class Factors:
    """The factors of one module in memory, and row blocks of their product."""

    def __init__(self, adapter: Adapter, lora: Lora) -> None:
        self.lora = lora
        self.a, self.b = adapter.factor(lora.a), adapter.factor(lora.b)
        self.magnitude = adapter.factor(lora.magnitude) if lora.magnitude else None

    def delta(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of `s B A` in the weight's own shape, float32."""
        a, b, scaling = self.a, self.b, self.lora.scaling
        if self.lora.kind == "linear":
            return (b[start:stop] @ a) * scaling
        if self.lora.kind in ("embedding", "conv1d"):
            return (b @ a[:, start:stop]).T * scaling
        if a.shape[2:] == (1, 1):
            return (b[start:stop, :, 0, 0] @ a[:, :, 0, 0])[:, :, None, None] * scaling
        return nn.functional.conv2d(a.transpose(0, 1), b[start:stop]).transpose(0, 1) * scaling

    def merge(self, weight: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight` (rows `start:stop`, changed in place) merged, and the delta that was added."""
        delta = self.delta(start, stop)
        if self.magnitude is not None:
            total = weight + delta
            norm = torch.linalg.norm(total, dim=1)
            merged = ((self.magnitude[start:stop] / norm).view(-1, 1) * total).to(weight.dtype)
            return merged, merged.float() - weight.float()
        # peft adds a linear delta in float32 and rounds once, an embedding's after rounding it to the weight's type
        weight += delta.to(weight.dtype) if self.lora.kind == "embedding" else delta
        return weight, delta


def _some(names: list[str], limit: int = 8) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
