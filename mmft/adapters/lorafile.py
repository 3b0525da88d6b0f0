"""A folder of plain LoRA factors, opened without its base, and a new one written tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from mmft.adapters.folder import CONFIG, TRAINED, WEIGHTS
from mmft.adapters.mixing import Factors, Mixed
from mmft.errors import AdapterError
from mmft.headers import header_problem

_PREFIX = "base_model.model."
_KEY = re.compile(r"^(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<table>[AB]))$")
_LORA_PART = re.compile(r"\.lora_\w+")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts that take the adapter's first value out of the base: such a delta does not belong to the plain base."""
_IRRELEVANT = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "runtime_config", "ensure_weight_tying"),
        "qalora_group_size",
    }
)
"""Fields that are used here, or do not change what the tensors mean. Any other must have its default value."""
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Module:
    """The factors of one module as they are in the file."""

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class LoraFolder:
    """An opened adapter folder: module names as in the base, and the names of tensors that are saved whole."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    modules: Mapping[str, Module] = field(repr=False)
    whole: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(module.a_shape[0] for module in self.modules.values())

    @property
    def base(self) -> str | None:
        """What the adapter says its base is called."""
        name = self.config.get("base_model_name_or_path")
        revision = self.config.get("revision")
        return f"{name}@{revision}" if name and revision else name

    def factors(self, name: str, weight: float) -> Factors:
        """The factors of a module in float32, as peft loads them."""
        module = self.modules[name]
        return Factors(self.read(module.a).float(), self.read(module.b).float(), module.scaling, weight)

    def read(self, key: str) -> torch.Tensor:
        """One tensor of the file. Raises AdapterError for NaN and infinity."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as stream:
            value = stream.get_tensor(key)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(
                f"{key} holds NaN or infinity", where=str(self.folder / WEIGHTS), do="use an earlier checkpoint"
            )
        return value


def open_lora(folder: Path) -> LoraFolder:
    """Read config and header of a peft folder. Raises AdapterError for anything but LoRA of the plain kind."""
    raw = _config(folder)
    if problem := header_problem(folder / WEIGHTS):
        raise AdapterError(f"{WEIGHTS} cannot be read: {problem}", where=str(folder), do="copy the adapter again")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stream:
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{WEIGHTS} cannot be read: {error}", where=str(folder), do="give the folder that peft or mmft wrote"
        ) from error
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        found = _KEY.match(key.removeprefix(_PREFIX))
        if found:
            pairs.setdefault(found["module"], {})[found["factor"] or f"embedding {found['table']}"] = key
        elif _LORA_PART.search(key):
            raise _odd(folder, f"it holds {key}")
        else:
            whole[key] = shape
    modules = {name: _module(folder, raw, name, found=pair, shapes=shapes) for name, pair in sorted(pairs.items())}
    if not modules:
        raise AdapterError(f"{folder.name} holds no LoRA factors", where=str(folder), do="give a LoRA adapter")
    return LoraFolder(folder, raw, modules, whole)


def write_lora(
    folder: Path,
    sources: Sequence[LoraFolder],
    modules: Mapping[str, Callable[[], Mixed]],
    *,
    kept: Mapping[str, LoraFolder],
) -> dict[str, int]:
    """Config and weights of a new adapter into `folder` (which exists); the rank of each module.

    Factors are made and written one module at a time, into a file whose header comes last, because only the factors
    know their rank. Price: the bytes are copied once more, when the header is put before them.
    """
    body = folder / f"{WEIGHTS}.body"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ranks: dict[str, int] = {}
    with body.open("wb") as stream:
        for key, value in _tensors(sources, modules, kept, ranks=ranks):
            start = stream.tell()
            stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            header[key] = {
                "dtype": _CODES[value.dtype],
                "shape": list(value.shape),
                "data_offsets": [start, stream.tell()],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / WEIGHTS).open("wb") as target, body.open("rb") as stream:
        target.write(len(text).to_bytes(8, "little") + text)
        while block := stream.read(4 << 20):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    body.unlink()
    _write_config(folder, sources, ranks, whole=sorted(kept))
    return ranks


def _tensors(
    sources: Sequence[LoraFolder],
    modules: Mapping[str, Callable[[], Mixed]],
    kept: Mapping[str, LoraFolder],
    *,
    ranks: dict[str, int],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Factors first, which are float32, so that the others, which may be smaller, cannot misalign them."""
    for name, produce in modules.items():
        module = next(item.modules[name] for item in sources if name in item.modules)
        mixed = produce()
        ranks[name] = mixed.a.shape[0]
        yield module.a, mixed.a
        yield module.b, mixed.b
    yield from sorted(((key, item.read(key)) for key, item in kept.items()), key=lambda pair: -pair[1].itemsize)


def _write_config(folder: Path, sources: Sequence[LoraFolder], ranks: dict[str, int], *, whole: list[str]) -> None:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    patterns: dict[str, int] = {}
    for other in sorted(set(ranks.values()) - {rank}):
        names = "|".join(re.escape(name) for name, value in ranks.items() if value == other)
        patterns[f"^(?:{names})$"] = other  # peft matches (.*\.)?(KEY)$ from the start: the ^ forbids a prefix
    first = sources[0].config
    saved = sorted({name for item in sources for name in item.config.get("modules_to_save") or ()})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        modules_to_save=(saved or None) if whole else None,
        fan_in_fan_out=bool(first.get("fan_in_fan_out", False)),
        task_type=first.get("task_type"),
        base_model_name_or_path=first.get("base_model_name_or_path"),
        revision=first.get("revision"),
        inference_mode=True,
        bias="none",
    )
    config.target_modules = sorted(ranks)  # type: ignore[assignment]  # peft keeps a set, whose order is not fixed
    config.save_pretrained(str(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        full = (folder / TRAINED).is_file()
        raise AdapterError(
            f"{folder} holds no {CONFIG}" + (": method full has trained weights, no adapter" if full else ""),
            where=str(folder),
            allowed="LoRA adapter folders",
            do="give the adapter folder of a run (RUN/adapter)",
        )
    try:
        raw = json.loads(path.read_bytes())
        kind = raw["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{CONFIG} cannot be read: {error}", where=str(path), do="copy the adapter again") from error
    if kind != "LORA":
        raise AdapterError(
            f"an adapter of type {kind} cannot be combined",
            where=f"{path}, peft_type",
            allowed="LORA (with rsLoRA and rank patterns)",
            do="load both adapters beside each other with peft, and switch between them",
        )
    defaults = {item.name: item for item in dataclasses.fields(LoraConfig)}
    for name, value in raw.items():
        if name not in _IRRELEVANT and value not in (None, False, _default(defaults.get(name))):
            raise _odd(folder, f"{name} is {value!r}")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise _odd(folder, f"init_lora_weights is {start!r}, which changes the base")
    return raw


def _default(item: dataclasses.Field[Any] | None) -> Any:
    if item is None:
        return None
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _odd(folder: Path, what: str) -> AdapterError:
    return AdapterError(
        f"{folder.name} is not plain LoRA and cannot be combined: {what}",
        where=str(folder),
        allowed="LoRA without biases and without DoRA, whose start left the base as it was",
        do="merge this adapter into its base, or train it as plain LoRA",
    )


def _module(
    folder: Path, raw: dict[str, Any], name: str, *, found: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Module:
    embedding = "embedding A" in found
    a, b = found.get("embedding A" if embedding else "A"), found.get("embedding B" if embedding else "B")
    if a is None or b is None or len(found) != 2 or shapes[a][0] != shapes[b][1]:
        raise AdapterError(
            f"the factors of {name} do not belong together: {', '.join(f'{k} {shapes[k]}' for k in found.values())}",
            where=str(folder / WEIGHTS),
            do="copy the adapter again",
        )
    rank = shapes[a][0]
    alphas, ranks = raw.get("alpha_pattern") or {}, raw.get("rank_pattern") or {}
    stated = ranks.get(get_pattern_key(list(ranks), name), raw.get("r"))
    if stated != rank:
        raise AdapterError(
            f"{name}: the tensors have rank {rank}, {CONFIG} says {stated}",
            where=str(folder),
            do="give the adapter folder as peft or mmft wrote it",
        )
    alpha = float(alphas.get(get_pattern_key(list(alphas), name), raw.get("lora_alpha", 8)))
    scaling = alpha / math.sqrt(rank) if raw.get("use_rslora") else alpha / rank
    return Module(a, b, shapes[a], shapes[b], scaling, embedding)
