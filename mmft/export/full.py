"""Saving a model whose own weights were trained (method `full`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmft.files import atomic_folder


def save_full(model: Any, processor: Any, out: Path, *, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write model, processor and chat template as an ordinary folder, weights cast to `dtype`; complete or absent.

    transformers maps names and tied weights on the way out; the model in memory keeps its own type.
    """
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    with atomic_folder(out, replace=True) as folder:
        kept = model.config.dtype
        model.config.dtype = dtype
        try:
            model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        finally:
            model.config.dtype = kept
        processor.save_pretrained(folder)
        umask = os.umask(0)
        os.umask(umask)
        for file in folder.iterdir():
            file.chmod(0o666 & ~umask)
