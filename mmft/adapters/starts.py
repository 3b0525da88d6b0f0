"""Where B A starts: seeded noise, a part of the weight (PiSSA, OLoRA), the error of quantization (LoftQ), data (EVA).

A start that is a part of the weight is never taken out of the base here. A second, frozen adapter holds it with the
opposite sign, so that the sum is the base; `W' = W + s (B A - B0 A0)` is then exact on disk, on a quantized base and
with the adapters switched off. Price: one more product of rank r per layer in the forward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.adapters.folder import peft_tensors
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.quantize import dequantized_weight
from mmft.errors import AdapterError
from mmft.recipe.schema import ModelSection
from mmft.seeds import fold

START = "start"
"""Name of the frozen adapter that holds the start with the opposite sign."""
PREFIX = "base_model.model."
"""What peft puts before the names of the model it wraps."""
_PASSES = 500  # batches after which EVA's components count as not converging


def lora_layers(model: Any) -> dict[str, Any]:
    """Base name -> LoRA layer of a PeftModel."""
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def seeded_start(model: Any, *, seed: int) -> None:
    """A from Kaiming's uniform distribution (bound 1/sqrt(fan_in), as in peft), drawn per layer; B zero."""
    for name, layer in lora_layers(model).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if down.is_meta:
            continue
        bound = 1.0 / math.sqrt(down[0].numel())
        source = torch.Generator().manual_seed(fold(seed, "adapter", name))
        down.copy_((torch.rand(down.shape, generator=source) * 2.0 - 1.0) * bound)
        up.zero_()


@torch.no_grad()
def weight_start(model: Any, kind: str, *, seed: int) -> None:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): the r largest singular triplets of W; `pissa_niter_N` finds them by
    N subspace iterations. OLoRA (Büyükakyüz 2024, arXiv 2406.01775): the first r columns and rows of W = Q R.

    The values are those of peft's own start. On a quantized base W is what the layer computes with. Price: one
    decomposition per layer in float32, min(out, in)² max(out, in) operations; little with `pissa_niter_N`.
    """
    layers = lora_layers(model)
    model.add_adapter(START, _frozen_copy(model))
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if not down.is_meta:
            a, b = _factors(matrix(layer), kind, rank=down.shape[0], scaling=layer.scaling["default"], name=name)
            down.copy_(a.view(down.shape))
            up.copy_(b.view(up.shape))
            layer.lora_A[START].weight.copy_(down)
            layer.lora_B[START].weight.copy_(-up)
    model.base_model.set_adapter(["default", START])
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[START].requires_grad_(False)


def _frozen_copy(model: Any) -> Any:
    config = copy.deepcopy(model.peft_config["default"])
    config.modules_to_save, config.lora_dropout, config.inference_mode = None, 0.0, True
    return config


def matrix(layer: Any) -> torch.Tensor:
    """The weight (out, in) that a tuner's base layer computes with, in float32."""
    base = layer.get_base_layer()
    if hasattr(base.weight, "quant_state") or hasattr(base.weight, "SCB"):
        return dequantized_weight(base, torch.float32)
    weight: torch.Tensor = base.weight.detach().float()
    return weight.T if isinstance(base, Conv1D) else weight.flatten(1)


def _factors(
    weight: torch.Tensor, kind: str, *, rank: int, scaling: float, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with `scaling * B A` (PiSSA) or `B A` (OLoRA) the chosen part of the weight."""
    if rank > min(weight.shape):
        raise AdapterError(
            f"{name} is {tuple(weight.shape)}: it has no part of rank {rank}",
            where="adapter.lora_rank",
            allowed=f"1 to {min(weight.shape)} with init_lora_weights: {kind}",
            do="set a smaller rank (for this part: adapter.parts), or init_lora_weights: default",
        )
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if kind == "pissa":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold(0, "pissa", name))
            u, s, v = torch.svd_lowrank(weight, rank, niter=int(kind.rpartition("_")[2]))
        vt = v.T
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


@torch.no_grad()
def loftq_start(model: Any, backbone: Backbone, *, names: Sequence[str]) -> None:
    """LoftQ (Li et al. 2023, arXiv 2310.08659) with the quantized base as it is, one iteration: `s B A` is the best
    rank-r part of `W - dequantized(W)`. Only the quantized layers (`names`) are started so.

    Price: the 16-bit weights are loaded once more, on the CPU, and one singular value decomposition per layer.
    """
    if next(backbone.model.parameters()).is_meta:
        return  # a plan: nothing is quantized there, and nothing is started
    layers = {name: layer for name, layer in lora_layers(model).items() if name in names}
    if not layers:
        raise AdapterError(
            "init_lora_weights: loftq has no effect: no targeted layer is quantized",
            where="adapter.init_lora_weights",
            do="name the targets' parts in quantization.parts, or take loftq out",
        )
    section = ModelSection(
        name_or_path=str(backbone.folder or backbone.name), revision=backbone.revision, attn_implementation="eager"
    )
    whole = load_backbone(section).model
    for name, layer in layers.items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        error = whole.get_submodule(name).weight.float().to(down.device) - matrix(layer)
        a, b = _factors(error, "pissa", rank=down.shape[0], scaling=layer.scaling["default"], name=name)
        down.copy_(a)
        up.copy_(b)


@torch.no_grad()
def eva_start(model: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """EVA (Paischer et al. 2024, arXiv 2410.07170): A is the main directions of the layer's inputs, B zero.

    The directions are peft's, found at the largest rank for every layer (its rho = 1); each layer takes the first ones
    up to the recipe's rank, so ranks are not moved between layers. Padding is left out. Price: forwards over `batches`
    (model inputs), again and again until the directions stand still. Raises AdapterError when a batch has fewer tokens
    than the rank, or they do not stand still.
    """
    from peft import get_eva_state_dict

    layers = lora_layers(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.rank_pattern = max(layer.r["default"] for layer in layers.values()), {}
    passes = 0

    def forward(found: Any, inputs: Mapping[str, Any]) -> Any:
        nonlocal passes
        passes += 1
        if passes > max(_PASSES, 20 * len(batches)):
            raise AdapterError(
                f"EVA's directions do not stand still after {passes - 1} batches",
                where="adapter.init_lora_weights: eva",
                do="give more rows, a smaller rank, or another start",
            )
        return found(**inputs)

    def rows(layer_input: Any, mask: torch.Tensor | None, name: str) -> torch.Tensor:
        hidden = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
        padded = mask is not None and hidden.ndim == 3 and hidden.shape[:2] == mask.shape
        flat: torch.Tensor = hidden[mask] if padded else hidden.reshape(-1, hidden.shape[-1])
        if min(flat.shape) < config.r:
            raise AdapterError(
                f"EVA finds {min(flat.shape)} directions for {name.removeprefix(PREFIX)}, and the rank is {config.r}",
                where="adapter.init_lora_weights: eva",
                do="set a smaller lora_rank, or a larger train.per_device_train_batch_size",
            )
        return flat

    def mask_of(inputs: Mapping[str, Any], _: Any) -> torch.Tensor | None:
        return inputs["attention_mask"].bool() if "attention_mask" in inputs else None

    directions = get_eva_state_dict(
        model,
        list(batches),
        peft_config=config,
        forward_fn=forward,
        prepare_model_inputs_fn=mask_of,
        prepare_layer_inputs_fn=rows,
        show_progress_bar=False,
    )
    for name, layer in layers.items():
        down = layer.lora_A["default"].weight
        down.copy_(directions[PREFIX + name][: len(down)])


def as_plain_lora(model: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """(tensors, config) of the adapter for the base as it is.

    With a start that is a part of the weight: `[A; A0]`, `[B, -B0]`, twice the rank and the same scaling, stated
    without rsLoRA's root.
    """
    tensors = peft_tensors(model)
    config = copy.deepcopy(model.peft_config["default"])
    if START not in model.peft_config:
        return tensors, config
    starts = peft_tensors(model, START)
    for name, value in starts.items():
        tensors[name] = torch.cat((tensors[name], value), 0 if ".lora_A." in name else 1)

    def alpha(value: float, rank: int) -> float:
        return 2.0 * rank * value / math.sqrt(rank) if config.use_rslora else 2.0 * value

    keys = (*config.rank_pattern, *config.alpha_pattern)
    config.alpha_pattern = {
        key: alpha(config.alpha_pattern.get(key, config.lora_alpha), config.rank_pattern.get(key, config.r))
        for key in keys
    }
    config.lora_alpha = alpha(config.lora_alpha, config.r)
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.r, config.use_rslora = 2 * config.r, False
    return tensors, config


def restart_modules(model: nn.Module, *, seed: int) -> None:
    """Bottleneck adapters: every layer's own draw from its name."""
    from mmft.adapters.bottleneck import BottleneckLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BottleneckLayer):
            source = torch.Generator().manual_seed(fold(seed, "adapter", name.removeprefix(PREFIX)))
            layer.reset_parameters("default", generator=source)
