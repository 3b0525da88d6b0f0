"""Modules and weights of the base that are named by parts: norms, blocks, biases, and whole sub-parts."""

from __future__ import annotations

import dataclasses

from torch import nn

from mmft.adapters.targets import Target, narrow
from mmft.backbones.load import Backbone
from mmft.backbones.parts import owners
from mmft.backbones.roots import head_of
from mmft.errors import AdapterError
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def fill_modules(backbone: Backbone, adapter: AdapterSection, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets with their module names: norms, blocks, and for mode `full` the largest modules of the sub-part.

    Targets that `layers` and `exclude` leave empty are taken out. Raises AdapterError when nothing is left, and for a
    quantized module that would be trained whole.
    """
    place = METHODS[adapter.method].place
    filled = []
    for target in targets:
        if target.mode == "full":
            modules = list(target.modules) or _largest(backbone, target)
            _refuse_quantized(backbone, modules)
        elif place == "norms":
            modules = narrow(backbone.parts, _norms(backbone, target), adapter)
        elif place == "blocks":
            from mmft.adapters.bottleneck import bottleneck_modules

            blocks = bottleneck_modules(
                backbone.parts, backbone.model, target.part, target.sub, placement=adapter.bottleneck_placement
            )
            modules = narrow(backbone.parts, blocks, adapter)
        else:
            modules = list(target.modules)
        if modules or target.parameters:
            filled.append(dataclasses.replace(target, modules=tuple(modules)))
    if not filled:
        raise AdapterError(
            f"the targets hold no {place} that {adapter.method} can sit on",
            where="adapter.targets",
            do="run mmft inspect to see the parts; name a part, for example language",
        )
    _refuse_both(filled)
    return tuple(filled)


def free_weights(backbone: Backbone, adapter: AdapterSection, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """Methods `full` and `bitfit`: gradients for the targets' own weights, or their biases alone.

    BitFit (Ben Zaken et al. 2022) trains every bias of the targets, of linear layers, convolutions and norms.
    """
    biases = adapter.method == "bitfit"
    counted = owners(backbone.model, backbone.parts)
    filled = []
    for target in targets:
        names = [
            name
            for name, (part, value) in counted.items()
            if part == target.part
            and backbone.parts.subpart_of(name) == target.sub
            and (not biases or (value.ndim == 1 and name.endswith("bias")))
        ]
        names = narrow(backbone.parts, names, adapter)
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        if not biases:
            _refuse_quantized(backbone, modules)
        for name in names:
            counted[name][1].requires_grad_(True)
        filled.append(dataclasses.replace(target, modules=tuple(modules)))
    filled = [target for target in filled if target.modules]
    if not filled and biases:
        raise AdapterError(
            f"the targets hold no biases ({', '.join(adapter.targets)}): many language models have none",
            where="adapter.targets",
            do="target parts that have biases, for example vision or projector, or choose ln_tuning",
        )
    if not filled:
        raise AdapterError(
            "the targets hold no weights of their own: the head's weight is the token table, which is part of language",
            where="adapter.targets",
            do="target language.embedding",
        )
    return tuple(filled)


def refuse_tied_head(backbone: Backbone, targets: tuple[Target, ...]) -> None:
    """A tied weight trained on one side only would make two different weights of one. Heads beside the tied one (a
    matching head) are free."""
    if not backbone.parts.tied_head:
        return
    tied = head_of(backbone.model)
    name = next((name for name, module in backbone.model.named_modules() if module is tied), "")

    def holds(target: Target) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in target.modules) or not target.modules

    hit = [
        t
        for t in targets
        if (t.part == "head" and holds(t)) or (t.mode == "full" and t.sub == "embedding" and t.part == "language")
    ]
    if hit:
        raise AdapterError(
            f"'{hit[0].part}' holds the token table, which this model shares between its input and its head",
            where="adapter.targets",
            allowed="language.attention, language.mlp and other parts; method: full trains both sides together",
            do="take it out of the targets, or set method: full",
        )


def _norms(backbone: Backbone, target: Target) -> list[str]:
    """Norms of the part with weights of their own; BatchNorm is left out, whose statistics would stay the base's."""
    return [
        name
        for name, module in backbone.model.named_modules()
        if backbone.parts.subs.get(name) == "norm"
        and backbone.parts.part_of(name) == target.part
        and next(module.parameters(recurse=False), None) is not None
        and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


def _largest(backbone: Backbone, target: Target) -> list[str]:
    """The largest modules that hold nothing but weights of the target's sub-part."""
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
    return found


def _refuse_both(targets: list[Target]) -> None:
    """A module that is trained whole holds no adapter: peft would leave the adapter out without a word."""
    saved = [name for target in targets if target.mode == "full" for name in target.modules]
    for target in targets:
        if target.mode == "lora":
            for name in (*target.modules, *target.parameters):
                top = next((s for s in saved if name == s or name.startswith(f"{s}.")), None)
                if top is not None:
                    raise AdapterError(
                        f"{name} is to get an adapter, and {top} is to be trained whole",
                        where="adapter.modules_to_save",
                        do=f"take {target.part}.{target.sub} out of adapter.targets, or {top} out of modules_to_save",
                    )


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
