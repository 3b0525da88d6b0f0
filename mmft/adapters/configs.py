"""The recipe's adapter section as peft's config of the method."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.adapters.targets import Target
from mmft.backbones.load import Backbone
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection
from mmft.seeds import fold

PLACEHOLDER_STEPS = 10
"""AdaLoRA's config must name a number of steps; the schedule of a run (`ranks.py`) replaces it."""
_NO_CONV = ("vera",)
_NO_CONV1D = ("oft", "boft", "loha", "lokr")


def make_config(adapter: AdapterSection, targets: Sequence[Target], backbone: Backbone, *, seed: int) -> Any:
    """peft's config of `adapter.method` with exact module names, in the recipe's own numbers.

    Raises AdapterError for a layer that the method cannot sit on.
    """
    names = [name for target in targets if target.mode == "lora" for name in target.modules]
    saved = [name for target in targets if target.mode == "full" for name in target.modules] or None
    _refuse_layers(adapter.method, names, backbone)
    return _MAKERS[adapter.method](adapter, targets, backbone, names, saved, seed)


def patterns(adapter: AdapterSection, targets: Sequence[Target]) -> tuple[dict[str, int], dict[str, Any]]:
    """peft's rank and alpha patterns: one anchored expression of exact names per part that differs."""
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for part, setting in adapter.parts.items():
        own = [t for t in targets if t.part == part and t.mode == "lora"]
        names = [name for t in own for name in (*t.modules, *t.parameters)]
        if not names:
            continue
        # peft matches (.*\.)?(KEY)$ from the start: the ^ inside forbids a prefix.
        key = "^(?:" + "|".join(re.escape(name) for name in names) + ")$"
        if setting.lora_rank is not None:
            ranks[key] = setting.lora_rank
        if setting.lora_alpha is not None:
            alphas[key] = setting.lora_alpha
    return ranks, alphas


def _lora(
    adapter: AdapterSection,
    targets: Sequence[Target],
    backbone: Backbone,
    names: list[str],
    saved: list[str] | None,
    seed: int,
) -> Any:
    from peft import EvaConfig, LoraConfig

    ranks, alphas = patterns(adapter, targets)
    eva = adapter.init_lora_weights == "eva"
    parameters = [name for target in targets if target.mode == "lora" for name in target.parameters]
    return LoraConfig(
        r=adapter.lora_rank,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.lora_dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights="eva" if eva else True,
        eva_config=EvaConfig(rho=1.0) if eva else None,
        target_modules=names,
        target_parameters=parameters or None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=saved,
        bias="none",
    )


def _adalora(
    adapter: AdapterSection, _: Sequence[Target], __: Backbone, names: list[str], saved: list[str] | None, ___: int
) -> Any:
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        target_r=adapter.lora_rank,
        init_r=math.ceil(1.5 * adapter.lora_rank),  # the paper's start
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.lora_dropout,
        total_step=PLACEHOLDER_STEPS,
        target_modules=names,
        modules_to_save=saved,
    )


def _vera(
    adapter: AdapterSection, _: Sequence[Target], __: Backbone, names: list[str], saved: list[str] | None, seed: int
) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=adapter.lora_rank,
        vera_dropout=adapter.lora_dropout,
        projection_prng_key=fold(seed, "adapter", "vera") % 2**31,
        save_projection=True,  # torch promises no equal draws over releases
        target_modules=names,
        modules_to_save=saved,
    )


def _oft(
    adapter: AdapterSection,
    _: Sequence[Target],
    backbone: Backbone,
    names: list[str],
    saved: list[str] | None,
    __: int,
) -> Any:
    from peft import BOFTConfig, OFTConfig

    _refuse_block(adapter, names, backbone)
    if adapter.method == "boft":
        return BOFTConfig(boft_block_size=adapter.oft_block_size, target_modules=names, modules_to_save=saved)
    return OFTConfig(r=0, oft_block_size=adapter.oft_block_size, target_modules=names, modules_to_save=saved)


def _lycoris(
    adapter: AdapterSection, targets: Sequence[Target], _: Backbone, names: list[str], saved: list[str] | None, __: int
) -> Any:
    from peft import LoHaConfig, LoKrConfig

    ranks, alphas = patterns(adapter, targets)
    kind = LoHaConfig if adapter.method == "loha" else LoKrConfig
    return kind(
        r=adapter.lora_rank,
        alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        target_modules=names,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=saved,
    )


def _ia3(
    adapter: AdapterSection, _: Sequence[Target], backbone: Backbone, names: list[str], saved: list[str] | None, __: int
) -> Any:
    """(IA)3 (Liu et al. 2022) scales keys, values and the inner activation of an MLP: an MLP's last layer gets its
    input scaled, every other layer its output."""
    from peft import IA3Config

    def narrows(name: str) -> bool:
        layer = backbone.model.get_submodule(name)
        width = getattr(layer, "out_features", None)
        return backbone.parts.subpart_of(name) == "mlp" and width is not None and width < layer.in_features

    last = [name for name in names if narrows(name)]
    return IA3Config(target_modules=names, feedforward_modules=last, modules_to_save=saved)


def _ln_tuning(
    _: AdapterSection, __: Sequence[Target], ___: Backbone, names: list[str], saved: list[str] | None, ____: int
) -> Any:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=names, modules_to_save=saved)


def _bottleneck(
    adapter: AdapterSection, _: Sequence[Target], __: Backbone, names: list[str], saved: list[str] | None, ___: int
) -> Any:
    from mmft.adapters.bottleneck import bottleneck_config

    return bottleneck_config(
        names,
        bottleneck_size=adapter.bottleneck_size,
        placement=adapter.bottleneck_placement,
        modules_to_save=saved or (),
    )


def _prompt(
    adapter: AdapterSection, _: Sequence[Target], __: Backbone, ___: list[str], ____: list[str] | None, _____: int
) -> Any:
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType

    kind = PromptTuningConfig if adapter.method == "prompt" else PrefixTuningConfig
    return kind(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=adapter.num_virtual_tokens)


_MAKERS: dict[
    str,
    Callable[[AdapterSection, Sequence[Target], Backbone, list[str], list[str] | None, int], Any],
] = {
    "lora": _lora,
    "adalora": _adalora,
    "vera": _vera,
    "oft": _oft,
    "boft": _oft,
    "loha": _lycoris,
    "lokr": _lycoris,
    "ia3": _ia3,
    "ln_tuning": _ln_tuning,
    "bottleneck": _bottleneck,
    "prompt": _prompt,
    "prefix": _prompt,
}


def _refuse_layers(method: str, names: Sequence[str], backbone: Backbone) -> None:
    for name in names:
        layer = backbone.model.get_submodule(name)
        conv = isinstance(layer, nn.Conv2d) and method in _NO_CONV
        if conv or (isinstance(layer, Conv1D) and method in _NO_CONV1D):
            raise AdapterError(
                f"peft has no {method} for {type(layer).__name__} layers ({name})",
                where="adapter.method",
                allowed="lora, adalora, ia3 on every kind of layer",
                do="choose another method, or exclude these layers (adapter.exclude)",
            )


def _refuse_block(adapter: AdapterSection, names: Sequence[str], backbone: Backbone) -> None:
    """peft would take another block size where the recipe's does not divide a width, layer by layer."""
    sizes = {}
    for name in names:
        layer: Any = backbone.model.get_submodule(name)
        sizes[name] = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    odd = [name for name, size in sizes.items() if size % adapter.oft_block_size]
    if odd:
        common = math.gcd(*sizes.values())
        fitting = [str(size) for size in range(2, min(common, 256) + 1) if common % size == 0]
        raise AdapterError(
            f"oft_block_size {adapter.oft_block_size} does not divide the input width {sizes[odd[0]]} of {odd[0]}",
            where="adapter.oft_block_size",
            allowed=", ".join(fitting) or "no size fits all targets",
            do="choose one that divides all widths, or fewer targets",
        )
