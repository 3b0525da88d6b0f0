"""Memory: what a run will need by part, and recomputation of the language layers' activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmft.adapters.build import Adapted


def checkpoint_layers(adapted: Adapted, count: int | None = None) -> list[nn.Module]:
    """Recompute language layers in the backward pass (one extra forward of them): the first `count` that gradients
    pass, all by default; returns them. The first, since their turn comes when the later layers' activations are gone.

    A layer recomputes while its own `training` flag is set; its submodules keep theirs.

    transformers' own switch also hooks the input embeddings of frozen towers and sends gradients through them; here
    only layers of the language model are touched. `preserve_rng_state` keeps dropout's draws the same.
    """
    base = adapted.backbone.model
    layers: list[nn.Module] = []
    able = {id(layer) for layer in recomputable(adapted)[:count]}
    for _, layer in base.named_modules():
        module: Any = layer
        if id(module) in able:
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layers.append(module)
    return layers


def recomputable(adapted: Adapted) -> list[nn.Module]:
    """The language model's layers, in order, without the first ones that no gradient passes: those keep nothing for
    the backward pass, so there is nothing to save by computing them again."""
    base = adapted.backbone.model
    layers: list[nn.Module] = [
        layer
        for name, layer in base.named_modules()
        if isinstance(layer, GradientCheckpointingLayer)
        and adapted.backbone.parts.part_of(name) in ("language", "cross_attention")
    ]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    known = {id(param) for layer in (*layers, *([head] if head is not None else [])) for param in layer.parameters()}
    if any(param.requires_grad and id(param) not in known for param in adapted.model.parameters()):
        return layers
    trained = [any(param.requires_grad for param in layer.parameters()) for layer in layers]
    return layers[trained.index(True) :] if True in trained else layers


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by owner; `total` is their sum."""

    weights: int
    trainable: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.trainable + self.optimizer + self.activations + self.logits


def estimate_memory(
    *,
    weight_bytes: int,
    trainable_parameters: int,
    tokens: int,
    supervised: int,
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    checkpointing: bool,
) -> MemoryEstimate:
    """A first estimate from shapes alone, good to about 30 %.

    Per token and layer the backward pass keeps about 14 hidden-wide and 4 intermediate-wide bf16 values (inputs of
    norms, attention, products and their adapters), or one hidden-wide value when layers are recomputed; the head
    keeps bf16 and fp32 logits of the supervised rows and their gradient.
    """
    per_layer = 2 * (14 * hidden + 4 * intermediate)
    kept = 2 * hidden * layers + per_layer if checkpointing else per_layer * layers
    return MemoryEstimate(
        weights=weight_bytes,
        trainable=8 * trainable_parameters,  # fp32 value and gradient
        optimizer=8 * trainable_parameters,  # two fp32 moments
        activations=tokens * kept,
        logits=supervised * vocabulary * 10,
    )
