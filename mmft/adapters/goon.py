"""Going on from an adapter that exists: its tensors as the start of the adapter that the recipe describes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mmft.adapters.folder import (
    TRAINED,
    WEIGHTS,
    check_base,
    compare,
    put_tensors,
    put_weights,
    read_config,
    read_sidecar,
    read_tensors,
)
from mmft.backbones.load import Backbone
from mmft.errors import AdapterError
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection

_FIELDS = {
    "use_dora": "adapter.use_dora",
    "placement": "adapter.bottleneck_placement",
    "oft_block_size": "adapter.oft_block_size",
    "boft_block_size": "adapter.oft_block_size",
    "num_virtual_tokens": "adapter.num_virtual_tokens",
}
"""peft's fields that change what the tensors mean, and the recipe's field for each."""


def go_on(model: Any, backbone: Backbone, adapter: AdapterSection, folder: Path) -> None:
    """Load the tensors of `folder` into the adapters of `model`.

    The recipe says what is trained; the folder must hold exactly these tensors for the same base, with the same
    scaling. Raises AdapterError for whatever differs, by name, with the recipe's field that would make it fit.
    """
    sidecar = read_sidecar(folder)
    if sidecar is not None:
        check_base(backbone, sidecar, folder)
    peft = METHODS[adapter.method].peft
    if peft is None:
        tensors = read_tensors(folder / TRAINED)
        wanted = {name for name, value in model.named_parameters() if value.requires_grad}
        compare(set(tensors), wanted, folder / TRAINED)
        put_weights(model, tensors, folder)
        return
    config = read_config(folder)
    if str(getattr(config.peft_type, "value", config.peft_type)) != peft:
        raise _differs(folder, "type", getattr(config.peft_type, "value", config.peft_type), (peft, "adapter.method"))
    own = model.peft_config["default"]
    for name, field in _FIELDS.items():
        if getattr(config, name, None) != getattr(own, name, None):
            raise _differs(folder, name, getattr(config, name, None), (getattr(own, name, None), field))
    if adapter.method == "adalora" and config.rank_pattern:
        raise AdapterError(
            "an AdaLoRA adapter whose ranks were allocated cannot be gone on from: what was cut off is not in the file",
            where=str(folder),
            do="start anew, or go on with a checkpoint of the same run (--resume)",
        )
    _same_scaling(model, config, folder)
    put_tensors(model, read_tensors(folder / WEIGHTS), folder)


def _same_scaling(model: Any, config: Any, folder: Path) -> None:
    """LoRA and its like: the folder's alpha / r, layer by layer, must be the recipe's, and so must be r."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import get_pattern_key

    if not hasattr(config, "r") or not hasattr(config, "alpha_pattern"):
        return
    rank_of = config.rank_pattern or {}
    default = getattr(config, "init_r", config.r)
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or "default" not in getattr(layer, "scaling", {}):
            continue
        rank = rank_of.get(get_pattern_key(list(rank_of), name), default)
        alphas = config.alpha_pattern or {}
        plain: float = config.lora_alpha if hasattr(config, "lora_alpha") else config.alpha
        alpha: float = alphas.get(get_pattern_key(list(alphas), name), plain)
        if rank != layer.r["default"]:  # type: ignore[attr-defined]
            raise _differs(folder, "rank", rank, (layer.r["default"], "adapter.lora_rank"))  # type: ignore[attr-defined]
        stored = alpha if hasattr(config, "init_r") else alpha / (math.sqrt(rank) if _rooted(config) else rank)
        found = layer.scaling["default"]  # type: ignore[attr-defined]
        if not math.isclose(stored, found, rel_tol=1e-9):
            raise _differs(folder, f"scaling (alpha / r) of {name}", stored, (found, "adapter.lora_alpha"))


def _rooted(config: Any) -> bool:
    return bool(getattr(config, "use_rslora", False))


def _differs(folder: Path, what: str, stored: Any, own: tuple[Any, str]) -> AdapterError:
    return AdapterError(
        f"the adapter to go on from has {what} {stored}, and the recipe {own[0]}",
        where=f"adapter.init_from: {folder}",
        do=f"change {own[1]}, or take another folder",
    )
