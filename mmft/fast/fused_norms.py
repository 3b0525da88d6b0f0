"""RMS norms through their own autograd (`norms`), on a CPU and where their weight is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmft.fast.norms import eps_of, is_rms_norm, rms_norm
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.probe import on_cpu
from mmft.fast.swap import swapped


class _FastNorm:
    """Mixed in before a norm's class."""

    mmft_eps: float
    weight: Tensor

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not torch.is_grad_enabled() or not x.requires_grad or self.weight.requires_grad:
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        return rms_norm(x, self.weight, self.mmft_eps)


def norms_of(model: nn.Module) -> Iterator[tuple[Any, float]]:
    """Frozen RMS norms by structure, with their eps."""
    for module in model.modules():
        eps = eps_of(module)
        if eps is not None and not module.weight.requires_grad:  # type: ignore[union-attr]
            yield module, eps


def holds(setting: Setting) -> tuple[bool, str]:
    """On a CPU, for models with RMS norms."""
    if not on_cpu(setting):
        return False, "accelerators have fused norms of their own, and time to spare"
    count = sum(1 for _ in norms_of(setting.adapted.backbone.model))
    if not count:
        return False, "no frozen RMS norm"
    return True, f"{count} modules with the structure of an RMS norm (each compared with the formula before training)"


def saves(setting: Setting) -> str:
    """Bytes by the widths of the norms."""
    wide = sum(len(norm.weight) for norm, _ in norms_of(setting.adapted.backbone.model))
    return f"{8 * wide / 1024:.0f} KB of activations a token, ten of twelve elementwise passes"


def install(setting: Setting, work: Work) -> Work:
    """Swap in those that compute the formula."""
    was = [(norm, type(norm), eps) for norm, eps in norms_of(setting.adapted.backbone.model) if is_rms_norm(norm, eps)]
    if not was:
        raise NotHere("the norms compute another formula")
    for norm, kind, eps in was:
        norm.mmft_eps = eps
        norm.__class__ = swapped(_FastNorm, kind)

    def take_back() -> None:
        for norm, kind, _ in was:
            norm.__class__ = kind
            del norm.mmft_eps

    return replace(work, undo=(*work.undo, take_back))


CANDIDATE = Candidate(
    "norms_fused", holds, saves, install, whole="it works on weights that are gathered for a layer's own forward only"
)
