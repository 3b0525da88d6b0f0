"""A batch of a real row to try an optimisation on before training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from mmft.data.collate import Batch
from mmft.data.loader import assemble, near
from mmft.fast.plan import Setting, Work


def probe_batch(setting: Setting, work: Work) -> Batch | None:
    """The first training row as a batch on the model's device, pictures in the type of its weights, or None."""
    if not setting.samples:
        return None
    backbone = setting.adapted.backbone
    pad = 0 if hasattr(work.renderer, "assemble") else backbone.pad_token_id
    first = next(iter(near(setting.samples, 1, work.renderer)), None)
    if first is None:
        return None
    batch = assemble(work.renderer, [(first, 0)], pad_token_id=pad)
    dtype = backbone.model.dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()}
    return work.prepare(replace(batch, inputs=inputs).to(next(work.adapted.model.parameters()).device))


def autocast_of(setting: Setting) -> AbstractContextManager[Any]:
    """The precision in which the run's forwards are computed."""
    if not setting.recipe.train.bf16:
        return nullcontext()
    device = next(setting.adapted.backbone.model.parameters()).device
    return torch.autocast(device.type, dtype=torch.bfloat16)


def on_cpu(setting: Setting) -> bool:
    """Whether the model computes on a CPU (a model without weights will, where there is no accelerator)."""
    device = next(setting.adapted.backbone.model.parameters()).device
    return not torch.accelerator.is_available() if device.type == "meta" else device.type == "cpu"
