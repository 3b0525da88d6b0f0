"""bitsandbytes 4- and 8-bit: which layers are quantized (exact names), and what makes that safe to train on a CPU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmft.backbones.parts import Parts
from mmft.errors import BackboneError, choices
from mmft.recipe.schema import QuantizationSection

BLOCK = 64
"""Weights that share one quantization constant in bitsandbytes' 4-bit types."""


def is_quantized(section: QuantizationSection) -> bool:
    """True when the section asks for quantized weights."""
    return section.load_in_4bit or section.load_in_8bit


def wanted_names(model: nn.Module, parts: Parts, section: QuantizationSection, *, on_cpu: bool) -> list[str]:
    """Names of the layers that are quantized: the linear layers of the section's parts, in the model's order.

    On a CPU, 4-bit layers whose input width is no multiple of the block of 64 weights stay in 16 bits, with a warning:
    bitsandbytes' CPU kernel takes the wrong block's constant for them and computes with wrong weights.
    Raises BackboneError when a part does not exist in this model or nothing is left to quantize.
    """
    for part in section.parts:
        if not parts.linears(part):
            able = [name for name in parts.names if parts.linears(name)]
            raise BackboneError(
                f"nothing to quantize: this model has no linear layers in part '{part}'",
                where="quantization.parts",
                allowed=choices(able, word=part),
                do="name parts that exist, or leave quantization.parts out",
            )
    names = [
        name
        for name, home in parts.linear.items()
        if home[0] in section.parts and isinstance(model.get_submodule(name), nn.Linear)
    ]
    if not (on_cpu and section.load_in_4bit):
        return names
    kept = [name for name in names if not _is_whole_blocks(model.get_submodule(name))]
    if len(kept) == len(names):
        raise BackboneError(
            f"none of the {len(names)} layers can be quantized on a CPU: no input width is a multiple of {BLOCK}",
            where="quantization.parts",
            allowed=f"4-bit layers with input widths that are multiples of {BLOCK}; on a GPU any width",
            do="use load_in_8bit, or train without quantization",
        )
    if kept:
        warnings.warn(
            f"{len(kept)} of {len(names)} layers stay in 16 bits: on a CPU bitsandbytes computes wrongly with input "
            f"widths that are no multiples of {BLOCK} ({kept[0]})",
            stacklevel=2,
        )
    return [name for name in names if name not in set(kept)]


def _is_whole_blocks(layer: Any) -> bool:
    return layer.in_features % BLOCK == 0


def quantization_config(section: QuantizationSection, quantized: Iterable[str], *, linears: Iterable[str]) -> Any:
    """A `BitsAndBytesConfig` that quantizes `quantized` and leaves the other `linears` (all linear layers of the
    model, also those no adapter can sit on) in 16 bits.

    transformers matches the skip list as regular expressions and as suffixes: each name is escaped and anchored, so
    that `proj` of a tower cannot also mean a layer of the language model.
    """
    from transformers import BitsAndBytesConfig

    if section.load_in_4bit and section.load_in_8bit:
        raise BackboneError(
            "load_in_4bit and load_in_8bit are both set", where="quantization", do="choose one of the two"
        )
    chosen = set(quantized)
    skipped = [f"{re.escape(name)}$" for name in linears if name not in chosen]
    if section.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, section.bnb_4bit_compute_dtype),
        llm_int8_skip_modules=skipped,
    )


def guard_cpu(model: nn.Module) -> int:
    """Stop 4-bit layers from repacking their weights on a CPU, and return how many layers there are.

    On CPUs with AVX512-BF16 a forward in eval mode replaces the weights by a packing that has no backward: the next
    training step would fail or, worse, have no gradient.
    """
    import bitsandbytes

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of the 4- and 8-bit layers, in the model's order; none when bitsandbytes was not used.

    A layer below an adapter has the name it had before (without peft's `.base_layer`).
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return []
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, kinds)]


def check_quantized(model: nn.Module, wanted: Iterable[str]) -> None:
    """Raises BackboneError when the layers that were quantized are not exactly the ones asked for."""
    found, asked = set(quantized_names(model)), set(wanted)
    if found != asked:
        odd = sorted(found ^ asked)
        raise BackboneError(
            f"{len(odd)} layers are quantized that should not be, or the other way round: {', '.join(odd[:5])}",
            where="quantization.parts",
            do="report this model; train it without quantization meanwhile",
        )


@torch.no_grad()
def dequantized_weight(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight (out, in) that a 4- or 8-bit layer computes with, in `dtype`, on the layer's device."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        weight: Any = module.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        weight = module.weight
        scales: Any = weight.SCB if weight.SCB is not None else module.state.SCB
        return (weight.data.float() * scales.float().unsqueeze(1) / 127.0).to(dtype)
    raise BackboneError(f"{type(module).__name__} is not a quantized layer")
