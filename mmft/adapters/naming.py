"""Module names that peft is to take as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def names_as_given(model: Any, adapter: Any) -> Iterator[None]:
    """While open, peft does not rewrite the target names of the config `adapter` for this model, and a model config
    that says nothing of ties says that there are none.

    peft turns `gate_proj`, `up_proj` and `down_proj` (`w1`, `w2`, `w3`) of mixture-of-experts families into stacked
    experts, wherever the module lies: right for an adapter of transformers 4, wrong for exact names (a projector's
    `merger.gate_proj`, a shared expert). It looks the family up by `config.model_type`. It also asks for the token
    table of a model whose config does not say whether it is tied, which not every family can answer.
    """
    config = model.config
    before = dict(vars(config))
    if adapter.peft_type == "LORA":
        config.model_type = f"{config.model_type} with exact names"
    if not hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        for name in ("model_type", "tie_word_embeddings"):
            vars(config).pop(name, None)
            if name in before:
                vars(config)[name] = before[name]
