"""The frozen language layers cut up over the ranks, as accelerate's launcher asks: by torch's `fully_shard` (FSDP2) or
by DeepSpeed's ZeRO-3 (mmft/engine/zero.py).

A rank keeps 1/n of every frozen language layer and gathers a layer whole for its forward and its backward. What is
trained stays whole on every rank, and so do embeddings, head and towers: optimizer, checkpoints, adapters and the sum
of gradients are those of a run without shards, and no rank gathers what another one does not (a rank without a picture
would wait for ever in a tower that is cut up). In return every rank must run the same number of forwards.

    memory of a rank: (language layers) / ranks + one or two layers whole + the rest;  traffic: two gathers a forward
(with a file of DeepSpeed's settings more layers stay whole, as its stage3_max_reuse_distance says)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmft.adapters.build import Adapted
from mmft.engine import zero
from mmft.errors import RecipeError
from mmft.journal import Journal
from mmft.recipe.schema import Recipe

METHODS = ("lora",)
"""Adapter methods that have been tried with layers that are cut up."""
STARTS = ("default", "eva")
"""Those whose first values leave the base's weights alone."""

_QUANTIZED = "quantized weights lose what they are unpacked with when they are cut up"


@dataclass(frozen=True)
class Shards:
    """What was cut: layers, their bytes over all ranks, and the bytes that every rank holds whole."""

    layers: int
    cut: int
    whole: int
    ranks: int

    def told(self) -> str:
        """One line."""
        return (
            f"{way()}: {self.layers} frozen language layers ({self.cut / 1e6:,.1f} MB) cut into {self.ranks} shards; "
            f"{self.whole / 1e6:,.1f} MB (trained weights, embeddings, head, towers) whole on every rank"
        )


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def asked(world: int = 2) -> bool:
    """Whether accelerate's launcher was configured to cut weights up, and there are ranks to cut them up over."""
    return (_set("ACCELERATE_USE_FSDP") or _set(zero.SWITCH)) and world > 1


def way() -> str:
    """Whose cuts these are, in words."""
    return "DeepSpeed ZeRO-3" if _set(zero.SWITCH) else "FSDP2"


@contextmanager
def plain_ranks() -> Iterator[None]:
    """While accelerate is set up: ranks as for DDP where its launcher was configured for DeepSpeed, which would load
    the base cut up by its own rules, towers and all, and clip and step in accelerate's place."""
    found = os.environ.pop(zero.SWITCH, None)
    try:
        yield
    finally:
        if found is not None:
            os.environ[zero.SWITCH] = found


def refuse_launcher() -> None:
    """Raise RecipeError for what accelerate can be configured to and mmft does not train with."""
    fsdp, version = _set("ACCELERATE_USE_FSDP"), os.environ.get("FSDP_VERSION", "1")
    reasons = {
        "FSDP_VERSION": (version != "2", f"for FSDP {version}, which mmft does not train with"),
        "FSDP_OFFLOAD_PARAMS": (
            _set("FSDP_OFFLOAD_PARAMS"),
            "to keep the shards in the host's memory, which mmft does not train with",
        ),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": (
            _set("FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "to load the base on rank 0 alone; every rank of mmft loads it and keeps a share",
        ),
    }
    wrong = [(where, what) for where, (bad, what) in reasons.items() if fsdp and bad]
    for where, what in [*(zero.wrong() if _set(zero.SWITCH) else ()), *wrong]:
        raise RecipeError(
            f"accelerate was configured {what}",
            where=where,
            allowed="one process, DDP (recipes/accelerate/ddp.yaml), FSDP2 (fsdp2.yaml there) or DeepSpeed's ZeRO-3 of "
            "frozen weights (deepspeed_zero3.yaml there, with pip install 'mmft[deepspeed]')",
            do="launch with one of these files; quantization.load_in_4bit (with DDP) makes a large base fit into "
            "one device",
        )
    if _set(zero.SWITCH):
        zero.settings()


def check_recipe(recipe: Recipe, *, custom: bool = False) -> None:
    """Raise RecipeError for a run whose ranks would not gather the same layers at the same time, or cannot at all."""
    quantized = recipe.quantization.load_in_4bit or recipe.quantization.load_in_8bit
    sft = recipe.objective.name == "sft" and not custom
    start = recipe.adapter.init_lora_weights
    reasons = (
        (not quantized, "quantization", _QUANTIZED),
        (sft, "objective.name", "only the loss of answers (sft) is known to run as many forwards on every rank"),
        (recipe.adapter.method in METHODS, "adapter.method", "has not been tried with layers that are cut up"),
        (start in STARTS, "adapter.init_lora_weights", "changes the base's weights, which a rank does not hold whole"),
    )
    for good, where, why in reasons:
        if not good:
            raise _refused(where, why)


def _refused(where: str, why: str) -> RecipeError:
    return RecipeError(
        f"{way()} cannot be used here: {why}",
        where=where,
        allowed=f"objective sft, method {', '.join(METHODS)}, a base in 16 or 32 bits with frozen language layers",
        do="launch with recipes/accelerate/ddp.yaml",
    )


def shard(adapted: Adapted, accelerator: Accelerator, journal: Journal) -> None:
    """Cut the frozen language layers of the model up, in place, put the rest onto the device, and say so.

    Raises RecipeError when no language layer has a frozen weight.
    """
    base: Any = adapted.backbone.model
    if adapted.backbone.quantized:
        raise _refused("model.name_or_path", _QUANTIZED)
    trained = set(adapted.trainable().values())
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, GradientCheckpointingLayer) and adapted.backbone.parts.part_of(name) == "language"
    }
    frozen = {value for layer in layers.values() for value in layer.parameters()} - trained
    if not frozen:
        raise _refused("adapter", "no language layer has a frozen weight, and only those are cut up")
    whole = {value for value in adapted.model.parameters() if value not in frozen}
    found = Shards(len(layers), _bytes(frozen), _bytes(whole), accelerator.num_processes)
    stacks = {name.rpartition(".")[0].rpartition(".")[0]: layer for name, layer in reversed(layers.items())}
    if trained - {value for layer in layers.values() for value in layer.parameters()}:
        for first in stacks.values():
            first.register_forward_pre_hook(_ask_gradients, with_kwargs=True)
    # The modules that run the layers, with no weights of their own here.
    runners = [base.get_submodule(name) for name in stacks]
    if _set(zero.SWITCH):
        zero.cut(list(layers.values()), frozen, runners[-1], accelerator.device)
    else:
        _fully_shard([*layers.values(), *runners], whole, accelerator)
    adapted.model.to(accelerator.device)
    journal.say(found.told())
    journal.event("shards", **asdict(found))


def _bytes(values: Iterable[nn.Parameter]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _fully_shard(modules: Sequence[nn.Module], whole: set[nn.Parameter], accelerator: Accelerator) -> None:
    """FSDP2; with the modules that run the layers, a layer can be gathered ahead."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    for module in modules:
        after = again if isinstance(module, GradientCheckpointingLayer) else None
        fully_shard(module, mesh=mesh, reshard_after_forward=after, ignored_params=whole)


def _ask_gradients(
    _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let gradients pass the first layer's input: where a projector or tower is trained, a rank with pictures gathers
    every layer for its backward, and one without would stop at the lowest adapter and leave it waiting."""
    if torch.is_grad_enabled():
        given = tuple(_asking(value) for value in given[:1]) + given[1:]
        named = {name: _asking(value) if name == "hidden_states" else value for name, value in named.items()}
    return given, named


def _asking(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad
    return value.detach().requires_grad_() if plain else value


def is_sharded(model: nn.Module) -> bool:
    """Whether layers of the model are cut up."""
    from torch.distributed.fsdp import FSDPModule

    return zero.is_cut(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def loading_device(accelerator: Accelerator) -> torch.device:
    """Where the base is loaded: the host for a model that is cut up afterwards, for which the device may be small."""
    return torch.device("cpu") if asked(accelerator.num_processes) else accelerator.device
