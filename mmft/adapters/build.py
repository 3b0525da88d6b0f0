"""Adapters on a backbone: LoRA through peft with exact names, or chosen parts trained without any adapter."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmft.adapters.targets import Target, resolve_targets
from mmft.backbones.load import Backbone
from mmft.backbones.parts import PARTS, owners
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection
from mmft.seeds import fold

PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""
_SAVED = ".modules_to_save.default"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters (names as in `Adapted.model`) of one part; a rate of None means the recipe's own."""

    part: str
    names: tuple[str, ...]
    learning_rate: float | None


@dataclass(frozen=True)
class Adapted:
    """A backbone made ready for training. `model` is what is called: a PeftModel (`lora`) or the model (`full`)."""

    model: Any
    backbone: Backbone
    targets: tuple[Target, ...]
    method: str
    groups: tuple[ParamGroup, ...]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained, sorted by name."""
        found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(sorted(found.items()))

    def table(self) -> list[list[str]]:
        """Rows of part, sub-part, mode, number of modules, number of trained parameters."""
        counts: dict[tuple[str, str], int] = {}
        for name, value in self.trainable().items():
            home = self.home(name)
            counts[home] = counts.get(home, 0) + value.numel()
        return [
            [t.part, t.sub, t.mode, str(len(t.modules)), f"{counts.get((t.part, t.sub), 0):,}"] for t in self.targets
        ]

    def home(self, name: str) -> tuple[str, str]:
        """(part, sub-part) of a parameter name of `model`."""
        plain = base_name(name)
        return self.backbone.parts.part_of(plain), self.backbone.parts.subpart_of(plain)


def base_name(name: str) -> str:
    """A parameter name of the peft-wrapped model without what peft put in."""
    return name.removeprefix(PREFIX).replace(_SAVED, "")


def build_adapters(backbone: Backbone, adapter: AdapterSection, *, seed: int) -> Adapted:
    """Put the adapters on the backbone's model (in place) and freeze everything else.

    LoRA's A starts from Kaiming's uniform distribution (bound 1/sqrt(fan_in), as in peft), drawn per module from
    `fold(seed, "adapter", name)`, so that a module's start depends on nothing but the seed and its name; B starts at
    zero. Adapters are float32 whatever the base is. Parts in mode `full` keep the type of the base.
    Raises AdapterError when a target matches nothing or cannot be trained that way.
    """
    targets = resolve_targets(backbone.parts, adapter)
    backbone.model.requires_grad_(False)
    if adapter.method == "full":
        targets = _free(backbone, targets)
        model: Any = backbone.model
    else:
        targets, model = _wrap(backbone, adapter, targets, seed=seed)
    adapted = Adapted(model, backbone, targets, adapter.method, ())
    return dataclasses.replace(adapted, groups=_groups(adapted, adapter))


def set_modes(adapted: Adapted) -> None:
    """train() for what is trained and for dropout in adapters, eval() for all else.

    BatchNorm always stays in eval(): its batch statistics would make the loss depend on how a step is cut into
    micro-batches. Layers that recompute their activations get their own flag set, without their children, because
    transformers only recomputes in layers that are in training.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    adapted.model.eval()
    trained = {target.part for target in adapted.targets if target.mode == "full"}
    recomputing = {target.part for target in adapted.targets} | {"language", "cross_attention"}

    def is_on(name: str, module: nn.Module) -> bool:
        part = adapted.home(name)[0]
        if adapted.method == "full" and part in trained:
            return True
        return bool(getattr(module, "gradient_checkpointing", False)) and part in recomputing

    layers: dict[str, Any] = dict(adapted.model.named_modules())
    for name, module in layers.items():
        if isinstance(module, BaseTunerLayer):
            nn.Module.train(module)  # type: ignore[type-var]
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.train()
        elif is_on(name, module):
            module.training = True
    for module in adapted.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def lora_layers(model: Any) -> dict[str, Any]:
    """Base name -> LoRA layer of a PeftModel."""
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _wrap(
    backbone: Backbone, adapter: AdapterSection, targets: tuple[Target, ...], *, seed: int
) -> tuple[tuple[Target, ...], Any]:
    from peft import LoraConfig, get_peft_model

    targets = tuple(_with_modules(backbone, target) for target in targets)
    names = [name for target in targets if target.mode == "lora" for name in target.modules]
    saved = [name for target in targets if target.mode == "full" for name in target.modules]
    if not names:
        raise AdapterError(
            "every trained part has mode: full, so there is no adapter", where="adapter.parts", do="set method: full"
        )
    _refuse_tied_head(backbone, targets)
    ranks, alphas = _patterns(adapter, targets)
    config = LoraConfig(
        r=adapter.lora_rank,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.lora_dropout,
        use_rslora=adapter.use_rslora,
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=saved or None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns about tied weights whenever a model has some, also where none of them is touched.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        model: Any = get_peft_model(backbone.model, config)
    # peft shortens the list to suffixes that are unique in this model; the file keeps the names that were meant.
    model.peft_config["default"].target_modules = sorted(names)
    model.peft_config["default"].base_model_name_or_path = backbone.name
    model.peft_config["default"].revision = backbone.revision
    _check_wrapped(model, names, saved)
    _start(model, seed=seed)
    return targets, model


def _patterns(adapter: AdapterSection, targets: tuple[Target, ...]) -> tuple[dict[str, int], dict[str, Any]]:
    """peft's rank and alpha patterns: one anchored expression of exact names per part that differs."""
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for part, setting in adapter.parts.items():
        names = [name for t in targets if t.part == part and t.mode == "lora" for name in t.modules]
        if not names:
            continue
        # peft matches (.*\.)?(KEY)$ from the start: the ^ inside forbids a prefix.
        key = "^(?:" + "|".join(re.escape(name) for name in names) + ")$"
        if setting.lora_rank is not None:
            ranks[key] = setting.lora_rank
        if setting.lora_alpha is not None:
            alphas[key] = setting.lora_alpha
    return ranks, alphas


def _check_wrapped(model: Any, names: list[str], saved: list[str]) -> None:
    from peft.utils import ModulesToSaveWrapper

    wrapped = {n.removeprefix(PREFIX) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    for found, wanted in ((set(lora_layers(model)), set(names)), (wrapped, set(saved))):
        odd = sorted(found ^ wanted)
        if odd:
            raise AdapterError(
                f"peft adapted other modules than the {len(wanted)} that were named: {', '.join(odd[:5])}",
                where="adapter.targets",
                do="report this model; a narrower target may work meanwhile",
            )


@torch.no_grad()
def _start(model: Any, *, seed: int) -> None:
    for name, layer in lora_layers(model).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if down.is_meta:
            continue
        bound = 1.0 / math.sqrt(down[0].numel())
        source = torch.Generator().manual_seed(fold(seed, "adapter", name))
        down.copy_((torch.rand(down.shape, generator=source) * 2.0 - 1.0) * bound)
        up.zero_()


def _with_modules(backbone: Backbone, target: Target) -> Target:
    """A `full` target with the largest modules that hold nothing but its own weights."""
    if target.mode == "lora":
        return target
    parts, model = backbone.parts, backbone.model
    homes = {
        name: (parts.part_of(name), parts.subpart_of(name))
        for name, _ in model.named_parameters(remove_duplicate=False)
    }
    wanted = (target.part, target.sub)
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or isinstance(module, _CONTAINERS) or any(name.startswith(f"{top}.") for top in found):
            continue
        held = [home for owned, home in homes.items() if owned.startswith(f"{name}.")]
        if held and all(home == wanted for home in held):
            found.append(name)
    _refuse_quantized(backbone, found)
    return dataclasses.replace(target, modules=tuple(found))


def _free(backbone: Backbone, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """Method `full`: gradients for the targets' own weights."""
    counted = owners(backbone.model, backbone.parts)
    filled = []
    for target in targets:
        names = [
            name
            for name, (part, _) in counted.items()
            if part == target.part and backbone.parts.subpart_of(name) == target.sub
        ]
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        _refuse_quantized(backbone, modules)
        for name in names:
            counted[name][1].requires_grad_(True)
        filled.append(dataclasses.replace(target, modules=tuple(modules)))
    if not any(target.modules for target in filled):
        raise AdapterError(
            "the targets hold no weights of their own: the head's weight is the token table, which is part of language",
            where="adapter.targets",
            do="target language.embedding",
        )
    return tuple(target for target in filled if target.modules)


def _refuse_quantized(backbone: Backbone, modules: list[str]) -> None:
    if not backbone.quantized:
        return
    from mmft.backbones.quantize import quantized_names

    packed = set(quantized_names(backbone.model))
    hit = [name for name in packed if any(name == top or name.startswith(f"{top}.") for top in modules)]
    if hit:
        part = backbone.parts.part_of(hit[0])
        raise AdapterError(
            f"part '{part}' is quantized and quantized weights cannot be trained in full ({sorted(hit)[0]})",
            where=f"adapter.parts.{part}",
            allowed="mode: lora for quantized parts",
            do=f"take {part} out of quantization.parts, or use mode: lora",
        )


def _refuse_tied_head(backbone: Backbone, targets: tuple[Target, ...]) -> None:
    """A tied weight trained on one side only would make two different weights of one."""
    if not backbone.parts.tied_head:
        return
    hit = [
        t for t in targets if t.part == "head" or (t.mode == "full" and t.sub == "embedding" and t.part == "language")
    ]
    if hit:
        raise AdapterError(
            f"'{hit[0].part}' holds the token table, which this model shares between its input and its head",
            where="adapter.targets",
            allowed="language.attention, language.mlp and other parts; method: full trains both sides together",
            do="take it out of the targets, or set method: full",
        )


def _groups(adapted: Adapted, adapter: AdapterSection) -> tuple[ParamGroup, ...]:
    by_part: dict[str, list[str]] = {}
    for name in adapted.trainable():
        by_part.setdefault(adapted.home(name)[0], []).append(name)
    rates: dict[str, float | None] = {part: setting.learning_rate for part, setting in adapter.parts.items()}
    return tuple(ParamGroup(part, tuple(by_part[part]), rates.get(part)) for part in PARTS if part in by_part)
