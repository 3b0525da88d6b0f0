"""Attention by matrix products (`attention`) in the place of torch's CPU kernel, where that is the faster one here.

It goes in through transformers' public registry of attention functions, for those sub-models that use `sdpa`; masks,
sliding windows and positions are made as for `sdpa`. Calls it is not meant for (one new token of a generation, dropout
on P, a bias by position, long rows without a causal mask) still go to `sdpa`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.fast.attention import KEPT_KEYS, choose_products, grouped_attention
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.probe import on_cpu
from mmft.fast.timed import kept_times

NAME = "mmft_products"
WINS_BY = 1.2
"""How much faster than torch's kernel it has to be, so that chance does not choose."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the arguments are those of its `sdpa` function."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    special = any(options.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    wide = key.shape[2] > KEPT_KEYS and not causal
    if special or wide or dropout or query.shape[2] == 1 or (causal and query.shape[2] != key.shape[2]):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return found
    out = grouped_attention(query, key, value, mask=attention_mask, causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def register(name: str = NAME, function: Callable[..., Any] = attention_forward) -> None:
    """Make a function known to transformers, with the masks of `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def configs_of(model: Any) -> dict[str, Any]:
    """The model's config under "", and its sub-models' by their name."""
    names = getattr(model.config, "sub_configs", {})
    found = {name: getattr(model.config, name, None) for name in names}
    return {"": model.config, **{name: config for name, config in found.items() if config is not None}}


def with_sdpa(model: Any) -> dict[str, Any]:
    """Those of `configs_of` whose attention is `sdpa`."""
    return {name: one for name, one in configs_of(model).items() if one._attn_implementation == "sdpa"}


def holds(setting: Setting) -> tuple[bool, str]:
    """On a CPU, for models whose attention can be chosen."""
    model = setting.adapted.backbone.model
    if not on_cpu(setting):
        return False, "accelerators have attention kernels of their own"
    chosen = [one._attn_implementation for one in configs_of(model).values()]
    if not getattr(model, "_supports_attention_backend", False) or not {"sdpa", "mmft_packed"} & set(chosen):
        return False, "the model's attention is not chosen by name, or is not sdpa"
    return True, "the same sums by matrix products, where they are faster on this machine (timed before training)"


def saves(setting: Setting) -> str:
    """Only the machine can tell."""
    return "time in attention, by a factor that is measured"


def seconds(run: Callable[[], Any], *, times: int = 3) -> float:
    """The least time of some calls after one."""
    run()
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def race(text: Any, dtype: torch.dtype, *, length: int = 256) -> tuple[float, float]:
    """Seconds of forward and backward of torch's kernel and of products, at the shapes of a config."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    shapes = [(2, count, length, width) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    wide = heads // groups
    slope = torch.randn(shapes[0], dtype=dtype)

    def kernel() -> None:
        keys, values = (one.repeat_interleave(wide, 1) for one in (key, value))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        torch.autograd.grad(out, (query, key, value), slope)

    def products() -> None:
        torch.autograd.grad(grouped_attention(query, key, value, mask=mask), (query, key, value), slope)

    with torch.enable_grad():
        return seconds(kernel), seconds(products)


def install(setting: Setting, work: Work) -> Work:
    """Choose the function for every sub-model that used `sdpa`. Raises NotHere where torch's kernel is as fast."""
    model = setting.adapted.backbone.model
    dtype = torch.bfloat16 if setting.recipe.train.bf16 else model.dtype
    text = model.config.get_text_config()
    shape = f"{text.num_attention_heads} x {text.hidden_size} {dtype}"
    theirs, ours = kept_times(f"attention_products {shape}", lambda: race(text, dtype))
    if theirs < WINS_BY * ours:
        raise NotHere(f"torch's kernel takes {theirs * 1e3:.1f} ms where products take {ours * 1e3:.1f} ms")
    register()
    was = {name: config._attn_implementation for name, config in configs_of(model).items()}
    model.set_attn_implementation({name: NAME for name in with_sdpa(model)})
    before = choose_products(True)

    def take_back() -> None:
        model.set_attn_implementation(was)
        choose_products(before)

    return replace(work, undo=(*work.undo, take_back))


CANDIDATE = Candidate(
    "attention_products", holds, saves, install, whole="ranks that time it would run unlike numbers of forwards"
)
