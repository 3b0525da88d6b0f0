"""Memory: what a run will need by part, and recomputation of the language layers' activations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmft.adapters.build import Adapted


def checkpoint_layers(adapted: Adapted) -> list[nn.Module]:
    """Recompute each language layer in the backward pass (one extra forward of them); returns the layers.

    A layer recomputes while its own `training` flag is set; its submodules keep theirs.

    transformers' own switch also hooks the input embeddings of frozen towers and sends gradients through them; here
    only layers of the language model are touched. `preserve_rng_state` keeps dropout's draws the same.
    """
    base = adapted.backbone.model
    layers: list[nn.Module] = []
    for name, layer in base.named_modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        module: Any = layer
        if adapted.backbone.parts.part_of(name) in ("language", "cross_attention"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            layers.append(module)
    return layers


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
