"""What every kind of generation shares: the model's own generation config, and a model in eval mode for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmft.errors import BackboneError

if TYPE_CHECKING:
    from transformers import GenerationConfig


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model below a PeftModel."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model  # pyright: ignore[reportReturnType]


def generation_config(model: nn.Module, tokenizer: Any, *, max_new_tokens: int, num_beams: int) -> GenerationConfig:
    """The model's generation config made deterministic: no sampling, our length, a pad token."""
    config: Any = copy.deepcopy(getattr(base_model(model), "generation_config", None))
    if config is None:
        raise BackboneError(
            f"{type(base_model(model)).__name__} cannot generate", do="evaluate only models with a language head"
        )
    config.update(do_sample=False, temperature=None, top_p=None, top_k=None, typical_p=None, min_p=None)
    config.update(max_new_tokens=max_new_tokens, max_length=None, num_beams=num_beams, use_cache=True)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.pad_token_id
    first_end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    config.pad_token_id = pad if pad is not None else first_end
    if config.pad_token_id is None:
        raise BackboneError(
            "the tokenizer has neither a pad nor an end token", do="set `pad_token` in the tokenizer's config"
        )
    return config


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """The ids that end an answer."""
    stop: Any = config.eos_token_id
    return frozenset(stop if isinstance(stop, list) else [stop])


def check_quantized(model: nn.Module) -> None:
    """Refuse 4-bit CPU layers whose next eval forward would repack their weights for good (and end training)."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        repacks = getattr(module, "support_avx512bf16_for_cpu", False)
        if repacks and isinstance(weight, torch.Tensor) and weight.device.type == "cpu":
            raise BackboneError(
                "a 4-bit layer would repack its weights in the first eval forward",
                where=name,
                do="load the model with mmft.backbones.load.load_backbone, which switches that off",
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside; outside every module's own flag again (frozen towers stay in eval while adapters train)."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
