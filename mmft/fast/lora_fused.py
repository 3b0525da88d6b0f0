"""LoRA layers through their own autograd (`lora_linear`, `lora_layers`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from mmft.errors import MmftError
from mmft.fast.lora_layers import (
    is_four_bit,
    join,
    lora_layers_of,
    put_in,
    put_in_blocks,
    shared_inputs,
    watch,
    why_not,
)
from mmft.fast.plan import Candidate, Setting, Work
from mmft.fast.probe import autocast_of, probe_batch


def chosen(model: Any) -> dict[str, Any]:
    """LoRA layers that can be made fast, by name."""
    return {name: layer for name, layer in lora_layers_of(model).items() if why_not(layer) is None}


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether there are plain LoRA layers; the reason counts them, and says what the others are."""
    if setting.adapted.method != "lora":
        return False, f"adapter.method is {setting.adapted.method}"
    train = setting.recipe.train
    stored = {layer.get_base_layer().weight.dtype for layer in chosen(setting.adapted.model).values()}
    if not train.bf16 and stored & {torch.bfloat16, torch.float16}:
        return False, "16-bit weights without train.bf16: peft computes the adapter in float32"
    reasons = Counter(why_not(layer) for layer in lora_layers_of(setting.adapted.model).values())
    able = reasons.pop(None, 0)
    others = "".join(f"; {count} stay with peft ({reason})" for reason, count in reasons.items())
    if not able:
        return False, f"no plain LoRA layer{others}"
    return True, f"{able} plain LoRA layers{others}"


def saves(setting: Setting) -> str:
    """What is kept for backward, by the widths of the layers."""
    layers = chosen(setting.adapted.model)
    wide = sum(layer.get_base_layer().in_features for layer in layers.values())
    return f"up to {4 * wide / 1024:.0f} KB of activations a token, and most passes that are no product"


def install(setting: Setting, work: Work) -> Work:
    """Swap the layers in; which of them share an input is seen in one forward of a real row."""
    model = work.adapted.model
    layers = chosen(model)
    batch = probe_batch(setting, work)
    groups: list[list[str]] = []
    if batch is not None:
        was = [(one, one.training) for one in model.modules()]
        model.eval()
        try:
            with torch.no_grad(), autocast_of(setting):
                groups = shared_inputs(watch(layers, lambda: model(**batch.inputs)))
        except (MmftError, RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            groups = []  # a model that is not called with the batch's inputs: every layer by itself is as exact
        finally:
            for one, training in was:
                one.training = training
    layers_back = put_in(layers)
    join(layers, groups)
    _, blocks_back = put_in_blocks(model, layers)
    return replace(work, undo=(*work.undo, layers_back, blocks_back))


CANDIDATE = Candidate(
    "lora_fused", holds, saves, install, whole="it works on weights that are gathered for a layer's own forward only"
)


# -- 4-bit weights, dequantised once ----------------------------------------------------------------------------------


def four_bit_bytes(setting: Setting) -> int:
    """Bytes of all 4-bit weights below LoRA layers in 16 bits."""
    bases = [layer.get_base_layer() for layer in chosen(setting.adapted.model).values()]
    return sum(2 * base.in_features * base.out_features for base in bases if is_four_bit(base))


def free_memory(setting: Setting) -> int:
    """Bytes that are free on the model's device."""
    device = next(setting.adapted.model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo", encoding="ascii") as stream:
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in stream}
    return sizes["MemAvailable"] * 1024


def once_holds(setting: Setting) -> tuple[bool, str]:
    """Whether a step's 16-bit weights may stay from forward to backward: at most half of the free memory."""
    if not holds(setting)[0]:
        return False, "there are no fast LoRA layers"
    wanted = four_bit_bytes(setting)
    if not wanted:
        return False, "no weight is stored in 4 bits"
    free = free_memory(setting)
    text = f"{wanted / 1e9:.2f} GB of 16-bit weights from forward to backward, {free / 1e9:.1f} GB are free"
    return 2 * wanted <= free, text


def once_saves(setting: Setting) -> str:
    """One of two dequantisations."""
    return f"{four_bit_bytes(setting) / 2e9:.2f} G weights dequantised once a micro-step, not twice"


def once_install(setting: Setting, work: Work) -> Work:
    """Let the layers keep what they dequantised; they go with the layers."""
    for layer in chosen_fast(work.adapted.model):
        layer.mmft_site.line.keeps = layer.mmft_site.four_bit
    return work


def chosen_fast(model: Any) -> list[Any]:
    """The layers that `install` put in."""
    return [layer for layer in lora_layers_of(model).values() if hasattr(layer, "mmft_site")]


ONCE = Candidate(
    "nf4_once", once_holds, once_saves, once_install, bits=False, whole="quantized weights are not cut up over ranks"
)
