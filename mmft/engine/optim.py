"""AdamW over the adapter's parameter groups, and a learning-rate schedule without state."""

from __future__ import annotations

import math

import torch
from torch import nn

from mmft.adapters.build import Adapted
from mmft.adapters.ranks import RankSchedule
from mmft.errors import AdapterError
from mmft.recipe.schema import TrainSection


def lr_scale(step: int, *, total: int, warmup_ratio: float, kind: str) -> float:
    """Factor on the peak learning rate for the update that makes `step` (counted from 0) of `total`.

    Linear warm-up over ceil(ratio * total) steps, then constant, linear to 0, or half a cosine to 0; a pure function
    of the step, so a resumed run needs no scheduler state.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = (step - warmup) / max(total - warmup, 1)
    if kind == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


class Masters:
    """float32 masters of what is trained; a parameter that is float32 already is its own master.

    AdamW's updates are often smaller than a bfloat16 weight's spacing and would be rounded away (Micikevicius et al.
    2018). Price: 4 bytes per trained 16-bit weight, and as much for its gradient during the update.
    """

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        self.params = params
        self.weights = {
            name: param if param.dtype == torch.float32 else nn.Parameter(param.detach().float())
            for name, param in params.items()
        }

    def take_gradients(self) -> None:
        """Move the 16-bit parameters' gradients to their masters."""
        for name, param in self.params.items():
            master = self.weights[name]
            if master is not param and param.grad is not None:
                master.grad, param.grad = param.grad.float(), None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the parameters the model computes with."""
        for name, param in self.params.items():
            if self.weights[name] is not param:
                param.copy_(self.weights[name])


def build_optimizer(
    adapted: Adapted, section: TrainSection, params: dict[str, nn.Parameter], *, total_steps: int | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); one group per (part, LoRA+'s side, decayed or not), each with its `peak_lr`.

    `params` are the masters by name. Weights of fewer than two dimensions (biases, norms, scales) are not decayed.
    AdaLoRA's allocation hangs on the optimizer and needs `total_steps`; AdapterError without.
    """
    groups: list[dict] = []
    for group in adapted.groups:
        peak = (group.learning_rate or section.learning_rate) * group.ratio
        for decay in (True, False):
            chosen = [params[name] for name in sorted(group.names) if (params[name].ndim >= 2) == decay]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": peak,
                        "peak_lr": peak,
                        "part": group.part,
                        "weight_decay": section.weight_decay if decay else 0.0,
                    }
                )
    optimizer = torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=True,
    )
    if adapted.method == "adalora":
        if total_steps is None:
            raise AdapterError(
                "AdaLoRA allocates its ranks over a known number of steps",
                where="adapter.method",
                do="pass total_steps to build_optimizer",
            )
        RankSchedule(adapted.model, total_steps).attach(optimizer)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Give every group `peak_lr * scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale
