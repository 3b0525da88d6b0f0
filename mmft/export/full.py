"""Saving a model whose own weights were trained (method `full`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mmft.export.merge import set_dtype
from mmft.files import atomic_folder, read_json_file, write_json


def save_full(model: Any, processor: Any, out: Path, *, dtype: torch.dtype, max_shard_size: str) -> None:
    """Write model, processor and chat template as an ordinary folder, weights cast to `dtype`; complete or absent.

    transformers maps names and tied weights on the way out; the model in memory keeps its own type.
    """
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    with atomic_folder(out, replace=True) as folder:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        # transformers states the type of the model in memory, and would load the weights in that.
        config = read_json_file(folder / "config.json")
        set_dtype(config, str(dtype).removeprefix("torch."))
        write_json(folder / "config.json", config)
        processor.save_pretrained(folder)
        umask = os.umask(0)
        os.umask(umask)
        for file in folder.iterdir():
            file.chmod(0o666 & ~umask)
