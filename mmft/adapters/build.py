"""Adapters on a backbone: peft's methods with exact names, or chosen weights trained without any adapter."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.adapters.configs import make_config
from mmft.adapters.goon import go_on
from mmft.adapters.naming import names_as_given
from mmft.adapters.prompts import refuse_prompt, start_prompt
from mmft.adapters.starts import (
    PREFIX,
    eva_start,
    loftq_start,
    lora_layers,
    restart_modules,
    seeded_start,
    weight_start,
)
from mmft.adapters.targets import Target, resolve_targets
from mmft.adapters.whole import fill_modules, free_weights, refuse_tied_head
from mmft.backbones.load import Backbone
from mmft.backbones.parts import PARTS
from mmft.errors import AdapterError
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection
from mmft.seeds import fold

__all__ = ["PREFIX", "Adapted", "ParamGroup", "base_name", "build_adapters", "lora_layers", "set_modes"]
_SAVED = ".modules_to_save.default"


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters (names as in `Adapted.model`) of one part; a rate of None means the recipe's own, and
    `ratio` is LoRA+'s factor on it."""

    part: str
    names: tuple[str, ...]
    learning_rate: float | None
    ratio: float = 1.0


@dataclass(frozen=True)
class Adapted:
    """A backbone made ready for training. `model` is what is called: a PeftModel, or for the methods `full` and
    `bitfit` the model."""

    model: Any
    backbone: Backbone
    targets: tuple[Target, ...]
    method: str
    groups: tuple[ParamGroup, ...]

    @property
    def switches(self) -> bool:
        """True when `model.disable_adapter()` gives the base."""
        return METHODS[self.method].peft is not None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained, sorted by name."""
        found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(sorted(found.items()))

    def table(self) -> list[list[str]]:
        """Rows of part, sub-part, mode, number of modules, number of trained parameters."""
        counts: dict[tuple[str, str, bool], int] = {}
        for name, value in self.trainable().items():
            key = (*self.home(name), _SAVED in name or self.method == "full")
            counts[key] = counts.get(key, 0) + value.numel()
        rows = []
        for t in self.targets:
            mode = self.method if t.mode == "lora" else t.mode
            modules = str(len(t.modules) + len(t.parameters))
            rows.append([t.part, t.sub, mode, modules, f"{counts.get((t.part, t.sub, t.mode == 'full'), 0):,}"])
        return rows

    def home(self, name: str) -> tuple[str, str]:
        """(part, sub-part) of a parameter name of `model`."""
        if name.startswith("prompt_encoder."):
            return "language", "embedding"
        prompt = METHODS[self.method].place == "prompt"
        plain = name.removeprefix("base_model.") if prompt else base_name(name)
        heads = (group.names for group in self.groups if group.part == "head")  # one may stand beside the backbone
        part = "head" if any(name in names for names in heads) else self.backbone.parts.part_of(plain)
        return part, self.backbone.parts.subpart_of(plain)


def base_name(name: str) -> str:
    """A parameter name of the peft-wrapped model without what peft put in."""
    return name.removeprefix(PREFIX).replace(_SAVED, "")


def build_adapters(
    backbone: Backbone,
    adapter: AdapterSection,
    *,
    seed: int,
    calibration: Sequence[Mapping[str, Any]] | None = None,
) -> Adapted:
    """Put the adapters on the backbone's model (in place) and freeze everything else.

    LoRA's A starts from Kaiming's uniform distribution (bound 1/sqrt(fan_in), as in peft), drawn per module from
    `fold(seed, "adapter", name)`, so that a module's start depends on nothing but the seed and its name; B starts at
    zero. Other starts are those of `starts.py`; `calibration` (model inputs, on the model's device) is what EVA looks
    at. Adapters are float32 whatever the base is. Parts in mode `full` keep the type of the base.
    Raises AdapterError when a target matches nothing or cannot be trained that way, or when `init_from` does not fit.
    """
    targets = resolve_targets(backbone.parts, adapter)
    backbone.model.requires_grad_(False)
    if METHODS[adapter.method].peft is None:
        targets = free_weights(backbone, adapter, targets)
        model: Any = backbone.model
    else:
        targets, model = _wrap(backbone, adapter, targets, seed=seed, calibration=calibration)
    if adapter.init_from is not None:
        go_on(model, backbone, adapter, Path(adapter.init_from).expanduser())
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
            module.training = True  # type: ignore[attr-defined]
            for child, inner in module.named_children():  # type: ignore[attr-defined]
                if child != "base_layer":
                    inner.train()
        elif isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.train()
        elif is_on(name, module):
            module.training = True
    for module in adapted.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _wrap(
    backbone: Backbone,
    adapter: AdapterSection,
    targets: tuple[Target, ...],
    *,
    seed: int,
    calibration: Sequence[Mapping[str, Any]] | None,
) -> tuple[tuple[Target, ...], Any]:
    from peft import get_peft_model

    prompt = METHODS[adapter.method].place == "prompt"
    if prompt:
        refuse_prompt(backbone, adapter)
    else:
        targets = fill_modules(backbone, adapter, targets)
        if not any(target.mode == "lora" for target in targets):
            raise AdapterError(
                "every trained part has mode: full, so there is no adapter",
                where="adapter.parts",
                do="set method: full",
            )
        refuse_tied_head(backbone, targets)
    config = make_config(adapter, targets, backbone, seed=seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns about tied weights whenever a model has some, also where none of them is touched.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        torch.manual_seed(fold(seed, "adapter"))  # for the starts that peft draws
        try:
            with names_as_given(backbone.model, config):
                model: Any = get_peft_model(backbone.model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            text = next(iter(str(error).splitlines()), type(error).__name__)[:300]
            raise AdapterError(
                f"peft cannot put {adapter.method} on this model: {text}",
                where="adapter.method",
                do="choose narrower targets, or method bitfit or full, which need nothing of peft",
            ) from error
    if prompt:
        start_prompt(model, backbone, adapter, seed=seed)
        targets = tuple(dataclasses.replace(target, modules=("prompt_encoder",)) for target in targets)
    else:
        # peft shortens the list to suffixes that are unique in this model; the file keeps the names that were meant.
        names = [name for target in targets if target.mode == "lora" for name in target.modules]
        model.peft_config["default"].target_modules = sorted(names)
        _check_wrapped(model, targets)
        _start(model, backbone, adapter, seed=seed, calibration=calibration)
    for found in model.peft_config.values():
        found.base_model_name_or_path, found.revision = backbone.name, backbone.revision
    return targets, model


def _check_wrapped(model: Any, targets: Sequence[Target]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    adapters = {name for target in targets if target.mode == "lora" for name in target.modules}
    for target in targets:
        for parameter in target.parameters:  # the second weight of a module is wrapped around the first
            name = parameter.rpartition(".")[0]
            while name in adapters:
                name += ".base_layer"
            adapters.add(name)
    saved = {name for target in targets if target.mode == "full" for name in target.modules}
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules()}
    for kind, wanted in ((BaseTunerLayer, adapters), (ModulesToSaveWrapper, saved)):
        odd = sorted({name for name, module in layers.items() if isinstance(module, kind)} ^ wanted)
        if odd:
            raise AdapterError(
                f"peft adapted other modules than the {len(wanted)} that were named: {', '.join(odd[:5])}",
                where="adapter.targets",
                do="report this model; a narrower target may work meanwhile",
            )


def _start(
    model: Any,
    backbone: Backbone,
    adapter: AdapterSection,
    *,
    seed: int,
    calibration: Sequence[Mapping[str, Any]] | None,
) -> None:
    if adapter.method == "bottleneck":
        restart_modules(model, seed=seed)
    if adapter.method != "lora":
        return
    kind = adapter.init_lora_weights
    seeded_start(model, seed=seed)
    if kind.startswith(("pissa", "olora")):
        weight_start(model, kind, seed=seed)
    elif kind == "loftq":
        from mmft.backbones.quantize import quantized_names

        loftq_start(model, backbone, names=quantized_names(backbone.model))
    elif kind == "eva" and not next(backbone.model.parameters()).is_meta:
        if not calibration:
            raise AdapterError(
                "init_lora_weights: eva looks at the inputs of the layers, and no batches were given",
                where="adapter.init_lora_weights",
                do="pass calibration to build_adapters",
            )
        eva_start(model, calibration)
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None  # what is on disk has been started


def _groups(adapted: Adapted, adapter: AdapterSection) -> tuple[ParamGroup, ...]:
    """Trained parameters by part, with LoRA+ (Hayou et al. 2024) B apart from the rest."""
    ratio = adapter.loraplus_lr_ratio or 1.0
    by_part: dict[tuple[str, bool], list[str]] = {}
    for name in adapted.trainable():
        fast = ratio != 1.0 and (".lora_B." in name or ".lora_embedding_B." in name)
        by_part.setdefault((adapted.home(name)[0], fast), []).append(name)
    rates: dict[str, float | None] = {part: setting.learning_rate for part, setting in adapter.parts.items()}
    return tuple(
        ParamGroup(part, tuple(by_part[part, fast]), rates.get(part), ratio if fast else 1.0)
        for part in PARTS
        for fast in (False, True)
        if (part, fast) in by_part
    )
