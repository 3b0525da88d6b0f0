"""bitsandbytes 4- and 8-bit: which layers are quantized (exact names), and what makes that safe to train on a CPU.

Checkpoints that are quantized already are judged here from their config, before a weight is read.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmft.backbones.parts import Parts
from mmft.errors import BackboneError, choices
from mmft.recipe.schema import QuantizationSection

BLOCK = 64
"""Weights that share one quantization constant in bitsandbytes' 4-bit types."""

_TRAINABLE = {
    "torchao": {"torchao": "torchao"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "awq": {"gptqmodel": "gptqmodel"},
    "aqlm": {"aqlm": "aqlm[gpu,cpu]"},
    "eetq": {"eetq": "eetq", "kernels": "kernels"},
}
"""Methods whose layers peft has a LoRA layer for: module that must be there -> package that brings it."""
_WEIGHT_ONLY = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")
"""torchao's types through which a gradient flows; those that quantize activations too cut it off without a word."""
_NO_BACKWARD = "its layers have no backward pass, so no gradient reaches the adapters"
_NO_LAYER = "peft has no LoRA layer for it"
_REFUSED = {
    "hqq": "transformers 5 cannot load it (its loader says 'not available yet')",
    "compressed-tensors": _NO_LAYER + " and its compressed weights are unpacked anew in every forward",
    "quanto": _NO_LAYER,
    "sinq": _NO_LAYER,
    "fp8": _NO_LAYER + " and its matrix products have no backward pass",
    "mxfp8": _NO_LAYER + " and its matrix products have no backward pass",
    **dict.fromkeys(("fbgemm_fp8", "mxfp4", "nvfp4", "metal", "higgs", "spqr", "vptq", "quark"), _NO_BACKWARD),
    **dict.fromkeys(("auto-round", "fp_quant", "fouroversix", "bitnet", "gemma"), _NO_LAYER),
    "gguf": "it is a format for inference",
}


@dataclass(frozen=True)
class Stored:
    """How a checkpoint's weights are quantized on disk. `bits` is given for bitsandbytes, 4 or 8."""

    method: str
    bits: int | None = None
    quant_type: str | None = None
    double_quant: bool | None = None

    @property
    def text(self) -> str:
        """In words."""
        words = [
            self.method,
            *([f"{self.bits} bits"] if self.bits else []),
            *([self.quant_type] * bool(self.quant_type)),
        ]
        return ", ".join(str(word) for word in words) + (", double" if self.double_quant else "")


def stored_quantization(config: Any, section: QuantizationSection | None = None, *, name: str) -> Stored | None:
    """What a checkpoint's config says about its weights; None when they are not quantized.

    `config` is a config of transformers or config.json as a dictionary, `section` what the recipe asks for: it may
    repeat what is stored, but not ask for something else. Which layers are quantized is then the checkpoint's affair,
    not `quantization.parts`. Raises BackboneError for a contradiction, for a method that adapters cannot be trained
    on (with the reason) and for one whose package is missing (with the package).
    """
    found = _stated(config)
    if not found:
        return None
    method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")) or "bitsandbytes")
    where = f"{name}, config.json: quantization_config"
    if method.startswith("bitsandbytes"):
        stored = _bitsandbytes(found, where)
    else:
        _check_method(method, found, where)
        stored = Stored(method)
    if section is not None:
        _check_section(stored, section, name)
    return stored


def _stated(config: Any) -> dict[str, Any]:
    """The quantization config, where transformers looks for it: at the top, then in the language model's config."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    for holder in (values, *(values.get(key) for key in ("text_config", "decoder", "generator"))):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key) if isinstance(holder, Mapping) else None
            if found:
                return dict(found) if isinstance(found, Mapping) else found.to_dict()
    return {}


def _bitsandbytes(found: Mapping[str, Any], where: str) -> Stored:
    four, eight = (bool(found.get(f"load_in_{n}bit") or found.get(f"_load_in_{n}bit")) for n in (4, 8))
    if four == eight:
        raise BackboneError(
            "the checkpoint says bitsandbytes, but not whether 4 or 8 bits",
            where=where,
            allowed="exactly one of load_in_4bit, load_in_8bit",
            do="write the folder again with save_pretrained",
        )
    if eight:
        return Stored("bitsandbytes", 8)
    kind, double = found.get("bnb_4bit_quant_type", "fp4"), found.get("bnb_4bit_use_double_quant", False)
    return Stored("bitsandbytes", 4, str(kind), bool(double))


def _check_method(method: str, found: Mapping[str, Any], where: str) -> None:
    able = "bitsandbytes, " + ", ".join(_TRAINABLE)
    if method not in _TRAINABLE:
        reason = _REFUSED.get(method, "mmft does not know this method")
        raise BackboneError(
            f"adapters cannot be trained on weights quantized by {method}: {reason}",
            where=where,
            allowed=able,
            do="use the 16-bit checkpoint this one was made from, with quantization.load_in_4bit: true",
        )
    missing = [pip for module, pip in _TRAINABLE[method].items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BackboneError(
            f"the weights are quantized by {method}, and {', '.join(missing)} is not installed",
            where=where,
            allowed=able,
            do=f"pip install {' '.join(missing)}, or use the 16-bit checkpoint this one was made from",
        )
    if method == "torchao":
        kinds = set(re.findall(r"\w+Config\b", str(found.get("quant_type"))))
        if not kinds or not kinds <= set(_WEIGHT_ONLY):
            raise BackboneError(
                f"adapters cannot be trained on torchao's {', '.join(sorted(kinds)) or found.get('quant_type')}",
                where=where,
                allowed=", ".join(_WEIGHT_ONLY) + " (peft has no layer for 4 bits, and no gradient passes layers that "
                "quantize activations)",
                do="quantize the 16-bit checkpoint with one of them, or train it with quantization.load_in_8bit: true",
            )


def _check_section(stored: Stored, section: QuantizationSection, name: str) -> None:
    asked: dict[str, tuple[object, object]] = {
        "load_in_4bit": (section.load_in_4bit, stored.bits == 4),
        "load_in_8bit": (section.load_in_8bit, stored.bits == 8),
    }
    if section.load_in_4bit and stored.bits == 4:
        asked["bnb_4bit_quant_type"] = (section.bnb_4bit_quant_type, stored.quant_type)
        asked["bnb_4bit_use_double_quant"] = (section.bnb_4bit_use_double_quant, stored.double_quant)
    for field, (want, have) in asked.items():
        if want and want != have or (field == "bnb_4bit_use_double_quant" and want != have):
            raise BackboneError(
                f"quantization.{field} is {str(want).lower()}, but the weights of {name} are quantized already "
                f"({stored.text})",
                where=f"quantization.{field}",
                allowed="no quantization section, or the one the checkpoint was made with",
                do="take the quantization section out of the recipe, or use the 16-bit checkpoint",
            )


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


def guard_stored(model: nn.Module, stored: Stored, *, name: str, on_cpu: bool) -> None:
    """Make a model that was loaded from quantized weights safe to train (`guard_cpu`).

    Raises BackboneError when nothing is quantized after all, and on a CPU for 4-bit layers whose input width is no
    multiple of 64, with which bitsandbytes computes wrongly: what is stored cannot be left in 16 bits.
    """
    names = quantized_names(model)
    if not names and stored.method in ("bitsandbytes", "torchao"):
        raise BackboneError(
            f"{name} says its weights are quantized ({stored.text}), but no layer is",
            where=f"{name}, config.json: quantization_config",
            do="take quantization_config out of config.json, or copy the folder again from its source",
        )
    if stored.method != "bitsandbytes":
        return
    guard_cpu(model)
    narrow = [layer for layer in names if on_cpu and stored.bits == 4 and not _is_whole_blocks(_layer(model, layer))]
    if narrow:
        raise BackboneError(
            f"{len(narrow)} of {len(names)} stored 4-bit layers have input widths that are no multiples of {BLOCK} "
            f"({narrow[0]}), with which bitsandbytes computes wrongly on a CPU",
            where=name,
            allowed=f"4-bit layers with input widths that are multiples of {BLOCK}; on a GPU any width",
            do="use the 16-bit checkpoint this one was made from",
        )


def _layer(model: nn.Module, name: str) -> Any:
    found: Any = model.get_submodule(name)
    return getattr(found, "base_layer", found)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of the quantized layers (bitsandbytes' 4 and 8 bits, torchao), in the model's order.

    A layer below an adapter has the name it had before (without peft's `.base_layer`).
    """
    if getattr(model, "quantization_method", None) == "torchao":
        found = [name for name, module in model.named_modules() if _is_torchao(module)]
        return [name.removesuffix(".base_layer") for name in found]
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return []
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return [name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, kinds)]


def _is_torchao(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and type(weight).__module__.partition(".")[0] == "torchao"


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
