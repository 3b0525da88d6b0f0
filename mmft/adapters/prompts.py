"""Prompt tuning (Lester et al. 2021) and prefix tuning (Li & Liang 2021): which models peft can do it on, and starts.

peft puts a prompt in front of the embedded tokens and a prefix into the key-value cache. Neither works where the model
derives something from the token ids or from the cache's length. Those models are refused here: one that only computed
slightly wrong positions would train without a word.
"""

from __future__ import annotations

from typing import Any

import torch

from mmft.backbones.load import Backbone
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection
from mmft.seeds import fold

_SMALL = 0.02  # standard deviation of a prefix's start, as of transformers' own weights


def refuse_prompt(backbone: Backbone, adapter: AdapterSection) -> None:
    """Raises AdapterError with the upstream reason when the method cannot work on this model."""
    reason = _reason(backbone, adapter.method)
    if reason is not None:
        raise _refusal(backbone, adapter, reason)


def _refusal(backbone: Backbone, adapter: AdapterSection, reason: str) -> AdapterError:
    return AdapterError(
        f"{adapter.method} tuning does not work on {type(backbone.model).__name__}: {reason}",
        where="adapter.method",
        allowed="lora and the other methods that sit on layers",
        do="choose another method; bottleneck and ia3 train about as few weights",
    )


def _reason(backbone: Backbone, method: str) -> str | None:
    model = backbone.model
    table = _table(model)
    if table is None or model.get_output_embeddings() is None:
        return "it writes no tokens"
    if getattr(model.config, "is_encoder_decoder", False):
        return "peft needs the sizes of one language model and finds an encoder and a decoder in the config"
    if any(hasattr(module, "get_rope_index") for module in model.modules()):
        why = "from the token ids, which a prompt hides" if method == "prompt" else "for an empty key-value cache only"
        return f"the positions of pictures (M-RoPE) are computed {why}"
    if method == "prompt":
        return None
    inner = {id(module) for module in model.get_decoder().modules()}
    crossing = [
        n for n, m in model.named_modules() if backbone.parts.roots.get(n) == "cross_attention" and id(m) in inner
    ]
    if crossing:
        return "the cache of its cross-attention layers holds the picture, and a prefix would take that place"
    return _other_cache(model)


def _table(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


@torch.no_grad()
def _other_cache(model: Any) -> str | None:
    """Run the decoder on one token and compare its cache with what peft would put there."""
    from peft import PrefixTuningConfig, TaskType
    from peft.utils.other import _prepare_prompt_learning_config

    if _table(model).weight.is_meta:
        return None
    config = _prepare_prompt_learning_config(
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=1), model.config
    )
    planned = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
    decoder = model.get_decoder()
    token = torch.tensor([[1]], device=_table(model).weight.device)
    layers = getattr(decoder(input_ids=token, use_cache=True).past_key_values, "layers", None)
    if not layers or getattr(layers[0], "keys", None) is None:
        return "its key-value cache is of a kind that peft does not fill"
    kept = {(len(layers), layer.keys.shape[1], layer.keys.shape[3]) for layer in layers}
    if kept != {planned}:
        return f"peft makes a prefix of (layers, heads, width) {planned}, and the model keeps {sorted(kept)}"
    return None


@torch.no_grad()
def start_prompt(model: Any, backbone: Backbone, adapter: AdapterSection, *, seed: int) -> None:
    """A prompt starts as the embeddings of ordinary tokens, drawn by the seed (Lester et al.: better than noise); a
    prefix as small noise. Raises AdapterError when peft has not found the token table."""
    if adapter.method == "prompt" and getattr(model, "word_embeddings", None) is not _table(backbone.model):
        rows = backbone.model.config.get_text_config().vocab_size
        raise _refusal(backbone, adapter, f"peft looks for a token table of {rows} rows and finds another or none")
    weight = model.prompt_encoder["default"].embedding.weight
    if weight.is_meta or _table(backbone.model).weight.is_meta:
        return
    source = torch.Generator().manual_seed(fold(seed, "adapter", adapter.method))
    if adapter.method == "prefix":
        weight.copy_(torch.randn(weight.shape, generator=source) * _SMALL)
        return
    table = _table(backbone.model)
    special = _special(backbone.model.config.to_dict())
    plain = torch.tensor([number for number in range(table.weight.shape[0]) if number not in special])
    chosen = plain[torch.randint(len(plain), (len(weight),), generator=source)]
    weight.copy_(table(chosen.to(table.weight.device)).float())


def _special(values: dict[str, Any]) -> set[int]:
    """Tokens that a config gives a meaning: an image token in a prompt would be taken for a picture."""
    found: set[int] = set()
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _special(value)
        elif "token" in str(key):
            found |= {item for item in (value if isinstance(value, (list, tuple)) else [value]) if type(item) is int}
    return found
