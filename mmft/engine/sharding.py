"""The frozen language layers cut up over the ranks (torch's `fully_shard`, FSDP2), as accelerate's launcher asks.

A rank keeps 1/n of every frozen language layer and gathers a layer whole for its forward and its backward. What is
trained stays whole on every rank, and so do embeddings, head and towers: optimizer, checkpoints, adapters and the sum
of gradients are those of a run without shards, and no rank gathers what another one does not (a rank without a picture
would wait for ever in a tower that is cut up). In return every rank must run the same number of forwards.

    memory of a rank: (language layers) / ranks + one or two layers whole + the rest;  traffic: two gathers a forward
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmft.adapters.build import Adapted
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
            f"FSDP2: {self.layers} frozen language layers ({self.cut / 1e6:,.1f} MB) cut into {self.ranks} shards; "
            f"{self.whole / 1e6:,.1f} MB (trained weights, embeddings, head, towers) whole on every rank"
        )


def _set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def asked(world: int = 2) -> bool:
    """Whether accelerate's launcher was configured for FSDP, and there are ranks to cut the layers up over."""
    return _set("ACCELERATE_USE_FSDP") and world > 1


def refuse_launcher() -> None:
    """Raise RecipeError for what accelerate can be configured to and mmft does not train with."""
    problems = {
        "ACCELERATE_USE_DEEPSPEED": (
            _set("ACCELERATE_USE_DEEPSPEED"),
            "accelerate was configured for DeepSpeed, which mmft does not train with: its engine owns the optimizer, "
            "clipping and checkpoints, on which exact resume rests; what ZeRO saves of frozen weights FSDP2 saves too",
        ),
        "FSDP_VERSION": (
            asked() and os.environ.get("FSDP_VERSION", "1") != "2",
            f"accelerate was configured for FSDP {os.environ.get('FSDP_VERSION', '1')}, which mmft does not train with",
        ),
        "FSDP_OFFLOAD_PARAMS": (
            asked() and _set("FSDP_OFFLOAD_PARAMS"),
            "accelerate was configured to keep the shards in the host's memory, which mmft does not train with",
        ),
        "FSDP_CPU_RAM_EFFICIENT_LOADING": (
            asked() and _set("FSDP_CPU_RAM_EFFICIENT_LOADING"),
            "accelerate was configured to load the base on rank 0 alone; every rank of mmft loads it and keeps a share",
        ),
    }
    for where, (wrong, what) in problems.items():
        if wrong:
            raise RecipeError(
                what,
                where=where,
                allowed="one process, DDP (recipes/accelerate/ddp.yaml) or FSDP2 (recipes/accelerate/fsdp2.yaml)",
                do="launch with one of these files; quantization.load_in_4bit (with DDP) makes a large base fit into "
                "one device",
            )


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
        f"FSDP2 cannot be used here: {why}",
        where=where,
        allowed=f"objective sft, method {', '.join(METHODS)}, a base in 16 or 32 bits with frozen language layers",
        do="launch with recipes/accelerate/ddp.yaml",
    )


def shard(adapted: Adapted, accelerator: Accelerator, journal: Journal) -> None:
    """Cut the frozen language layers of the model up, in place, put the rest onto the device, and say so.

    Raises RecipeError when no language layer has a frozen weight.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

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
    cut = sum(value.numel() * value.element_size() for value in frozen)
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, ignored_params=whole)
    for stack in {name.rpartition(".")[0].rpartition(".")[0] for name in layers}:
        # The module that runs the layers, with no weights of its own here: it lets a layer be gathered ahead.
        fully_shard(base.get_submodule(stack), mesh=mesh, ignored_params=whole)
    adapted.model.to(device)
    rest = sum(value.numel() * value.element_size() for value in whole)
    found = Shards(len(layers), cut, rest, accelerator.num_processes)
    journal.say(found.told())
    journal.event("shards", **asdict(found))


def is_sharded(model: nn.Module) -> bool:
    """Whether layers of the model are cut up."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def loading_device(accelerator: Accelerator) -> torch.device:
    """Where the base is loaded: the host for a model that is cut up afterwards, for which the device may be small."""
    return torch.device("cpu") if asked(accelerator.num_processes) else accelerator.device
