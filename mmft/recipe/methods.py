"""What each `adapter.method` is, as a table: what it reads from the recipe, where it sits, what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["linears", "norms", "biases", "blocks", "prompt", "weights"]


@dataclass(frozen=True, slots=True)
class Method:
    """One method. `reads` are the fields of `adapter` that mean something for it, beside those in `COMMON`.

    `place`: what the targets are taken for (`linears`: layers of products, `blocks`: whole sub-layers, `prompt`: the
    input of the language model, `weights`: no adapter at all). `peft` is peft's name of the type; None for methods
    that save plain weights of the base. `on_quantized`: works on 4- and 8-bit layers. `merges`: becomes part of the
    base's weights without a rest.
    """

    reads: frozenset[str]
    place: Place
    peft: str | None
    on_quantized: bool
    merges: bool


COMMON = frozenset({"method", "targets", "parts", "layers", "exclude", "init_from"})
_SAVES = frozenset({"modules_to_save"})
_RANK = _SAVES | {"lora_rank", "lora_alpha"}

METHODS: dict[str, Method] = {
    "lora": Method(
        _RANK | {"lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio"},
        "linears",
        "LORA",
        on_quantized=True,
        merges=True,
    ),
    "adalora": Method(_RANK | {"lora_dropout"}, "linears", "ADALORA", on_quantized=True, merges=True),
    "vera": Method(_SAVES | {"lora_rank", "lora_dropout"}, "linears", "VERA", on_quantized=True, merges=True),
    "oft": Method(_SAVES | {"oft_block_size"}, "linears", "OFT", on_quantized=True, merges=True),
    "boft": Method(_SAVES | {"oft_block_size"}, "linears", "BOFT", on_quantized=True, merges=True),
    "loha": Method(_RANK, "linears", "LOHA", on_quantized=False, merges=True),
    "lokr": Method(_RANK, "linears", "LOKR", on_quantized=False, merges=True),
    "ia3": Method(_SAVES, "linears", "IA3", on_quantized=True, merges=True),
    "ln_tuning": Method(_SAVES, "norms", "LN_TUNING", on_quantized=True, merges=True),
    "bitfit": Method(frozenset(), "biases", None, on_quantized=True, merges=True),
    "bottleneck": Method(
        _SAVES | {"bottleneck_size", "bottleneck_placement"}, "blocks", "BOTTLENECK", on_quantized=True, merges=False
    ),
    "prompt": Method(frozenset({"num_virtual_tokens"}), "prompt", "PROMPT_TUNING", on_quantized=True, merges=False),
    "prefix": Method(frozenset({"num_virtual_tokens"}), "prompt", "PREFIX_TUNING", on_quantized=True, merges=False),
    "full": Method(frozenset(), "weights", None, on_quantized=False, merges=True),
}

PART_RANKS = ("lora", "loha", "lokr")
"""Methods whose rank and alpha may differ from part to part."""


def readers(field: str) -> list[str]:
    """The methods that a field of `adapter` means something for."""
    return [name for name, method in METHODS.items() if field in method.reads or field in COMMON]
