"""Saving a model whose own weights were trained (method `full`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mmft.files import atomic_folder, write_json


def save_full(model: Any, processor: Any, out: Path, *, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write model, processor and chat template as an ordinary folder, weights cast to `dtype`; complete or absent.

    transformers maps names on the way out and leaves out the second name of a tied weight; the model in memory keeps
    its own type. Modes follow the umask. Price: one copy of the weights in `dtype`.
    """
    cast: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        key = value.data_ptr()
        if key not in cast or value.numel() == 0:
            plain = value.to(dtype) if value.is_floating_point() else value
            cast[key] = plain.detach().cpu().contiguous()
        state[name] = cast[key]
    with atomic_folder(out, replace=True) as folder:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _set_dtype(config, str(dtype).removeprefix("torch."))
        write_json(folder / "config.json", config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The type of the stored weights, in a config and the configs of its parts."""
    if "dtype" in config:
        config["dtype"] = dtype
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, dtype)
