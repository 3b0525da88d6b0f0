"""The head's loss with the gradient formed in the forward pass (`linear_loss`), for `sft` and `captioning`.

The hidden states of the supervised rows are caught by a hook before the head, which is then given no row at all, so
that the model's own code stays as it is. Whether that code does more to logits than a linear layer is seen in one
forward of a real row with states made large, against the scale and the soft cap that the config states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.render import IGNORED
from mmft.fast.linear_loss import LinearHead, linear_cross_entropy
from mmft.fast.lora_layers import why_not
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.probe import autocast_of, probe_batch
from mmft.objectives.base import Loss, by_source
from mmft.objectives.captioning import CaptioningObjective, head_on_text
from mmft.objectives.sft import SftObjective, head_on_rows

LARGE = 60.0
"""Logits in the proof reach this size, where a soft cap of any model shows."""


@contextmanager
def caught(head: nn.Module, *, times: float = 1.0, keep: bool = False) -> Iterator[list[Tensor]]:
    """While open, what `head` is given (times a factor) is put into the list, and the head is given no row of it
    (all of it with `keep`)."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0] if times == 1.0 else args[0] * times
        seen.append(hidden)
        return (hidden if keep else hidden[:, :0], *args[1:])

    handle = head.register_forward_pre_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()


class InForward:
    """An objective whose cross-entropy is that of `linear_loss`; everything else is the objective's own."""

    def __init__(self, inner: SftObjective | CaptioningObjective, head: LinearHead) -> None:
        self.inner = inner
        self.head = head
        self.name = inner.name
        self.metrics = inner.metrics

    def count(self, batch: Batch) -> int:
        """Supervised positions of the batch."""
        return self.inner.count(batch)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """`Loss(sum, count)` of one forward; `logs["correct"]` counts greedy hits."""
        rows, wanted, chosen = _rows(self.inner, batch)
        module = self.inner.head
        assert module is not None
        with chosen, caught(module) as seen:
            model(**batch.inputs, **_options(self.inner))
        hidden = seen[-1].reshape(-1, seen[-1].shape[-1])
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        smoothing = self.inner.label_smoothing
        total, correct, terms = linear_cross_entropy(hidden, wanted, self.head, smoothing=smoothing, dtype=dtype)
        return Loss(total, batch.supervised, {"correct": correct} | by_source(terms, batch))


def _rows(
    inner: SftObjective | CaptioningObjective, batch: Batch
) -> tuple[Tensor, Tensor, AbstractContextManager[None]]:
    """Supervised positions, their labels, and the hook that lets the head see them only."""
    assert inner.head is not None
    if isinstance(inner, SftObjective):
        targets = batch.labels[:, 1:]
        rows = F.pad(targets != IGNORED, (0, 1), value=False)
        return rows, targets[targets != IGNORED], head_on_rows(inner.head, rows, ahead=inner.ahead)
    rows = batch.labels != IGNORED
    return rows, batch.labels[rows], head_on_text(inner.head, rows)


def _options(inner: SftObjective | CaptioningObjective) -> dict[str, Any]:
    return {"use_cache": False} if isinstance(inner, SftObjective) else inner.options


def linear_head(module: Any, config: Any) -> LinearHead:
    """The head that a module and a model's config describe. Raises NotHere with the reason when there is none."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    head = None
    if isinstance(module, LoraLayer):
        reason = why_not(module)
        (name,) = module.lora_A
        if reason is None and isinstance(module.lora_dropout[name], nn.Identity):
            base: Any = module.get_base_layer()
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            head = LinearHead(base.weight, base.bias, a, b, module.scaling[name])  # type: ignore[arg-type]
    elif type(module) is nn.Linear:
        head = LinearHead(module.weight, module.bias)
    if head is None or not head.weight.is_floating_point():
        raise NotHere(f"the head is no plain linear layer ({type(module).__name__})")
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return replace(head, cap=float(cap) if cap else None, scale=scale)


def holds(setting: Setting) -> tuple[bool, str]:
    """For objectives that are the cross-entropy of answers."""
    if setting.custom or setting.recipe.objective.name not in ("sft", "captioning"):
        return False, "the loss of this objective is no cross-entropy of a head"
    return True, "the loss is a cross-entropy of a linear head (proven on a real row before training)"


def saves(setting: Setting) -> str:
    """Memory; the products are the same two."""
    text = setting.adapted.backbone.model.config.get_text_config()
    return f"{10 * text.vocab_size / 1e6:.1f} MB for each supervised token"


def install(setting: Setting, work: Work) -> Work:
    """Put the objective in whose head makes its gradient in the forward pass. Raises NotHere when the model's logits
    are not those of the head."""
    inner = work.objective
    if not isinstance(inner, SftObjective | CaptioningObjective) or inner.head is None:
        raise NotHere("the loss of this objective is no cross-entropy of a head")
    head = linear_head(inner.head, setting.adapted.backbone.model.config.get_text_config())
    _prove(setting, work, inner, head)
    return replace(work, objective=InForward(inner, head))


def _prove(setting: Setting, work: Work, inner: SftObjective | CaptioningObjective, head: LinearHead) -> None:
    batch = probe_batch(setting, work)
    if batch is None:
        raise NotHere("no row to try it on")
    module, (_, _, chosen) = inner.head, _rows(inner, batch)
    assert module is not None
    was = [(one, one.training) for one in work.adapted.model.modules()]
    work.adapted.model.eval()
    try:
        with torch.no_grad(), autocast_of(setting):
            with chosen, caught(module) as seen:
                work.adapted.model(**batch.inputs, **_options(inner))
            hidden = seen[-1]
            largest = float(head.raw(hidden.reshape(-1, hidden.shape[-1]), head.weight.to(hidden.dtype)).abs().max())
            times = LARGE / max(largest, 1e-3)
            with _rows(inner, batch)[2], caught(module, times=times, keep=True) as seen:
                theirs = work.adapted.model(**batch.inputs, **_options(inner)).logits.float()
            kind = seen[-1].device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else seen[-1].dtype
            large = seen[-1].to(dtype)
            ours = head.shaped(head.raw(large, head.weight.to(dtype))).float()
    finally:
        for one, training in was:
            one.training = training
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    off = float((ours - theirs.reshape(ours.shape)).abs().max()) / LARGE if theirs.numel() == ours.numel() else 1.0
    if not off <= limit:
        raise NotHere(f"the model's logits are not those of its head (off by {off:.1%} of the largest)")


CANDIDATE = Candidate("head_in_forward", holds, saves, install)
