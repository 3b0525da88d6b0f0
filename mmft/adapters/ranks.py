"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) between the optimizer's steps: penalty, importance, budget.

peft's own way needs a call between `backward` and `zero_grad` and a loss that the model itself computes. Here both
halves hang on the optimizer's public hooks, and what the allocation remembers lies in the optimizer's state, so that a
checkpoint holds it and a resumed run allocates the same ranks.
"""

from __future__ import annotations

from typing import Any

import torch

_NOW, _SPREAD, _KEPT = "importance", "uncertainty", "kept"


class RankSchedule:
    """The schedule of one run of `total` optimizer steps: full ranks for a tenth of them, fixed ones for the last
    third, a cubic way down in between."""

    def __init__(self, model: Any, total: int) -> None:
        self.base = model.base_model
        self.config = model.peft_config["default"]
        self.config.total_step = total
        self.config.tinit, self.config.tfinal = total // 10, total // 3
        self.config.deltaT = max(1, total // 100)
        marks = ("lora_A.default", "lora_B.default", "lora_E.default")
        inner = self.base.model.named_parameters()
        self.params = {name: value for name, value in inner if name.endswith(marks)}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Run before and after every step of this optimizer."""
        optimizer.register_step_pre_hook(lambda *_: self.add_penalty())
        optimizer.register_step_post_hook(lambda found, *_: self.allocate(found))

    @torch.no_grad()
    def add_penalty(self) -> None:
        """Add the gradient of `weight * mean |A Aᵀ - I| + |Bᵀ B - I|` (Frobenius), once a step and after clipping."""
        sides = {name: value for name, value in self.params.items() if "lora_E" not in name and value.grad is not None}
        for name, value in sides.items():
            rows = value if "lora_A" in name else value.T
            off = rows @ rows.T - torch.eye(len(rows), device=value.device, dtype=value.dtype)
            norm = torch.linalg.norm(off)
            if norm > 0:
                slope = (2.0 / norm) * (off @ rows) * (self.config.orth_reg_weight / len(sides))
                assert value.grad is not None
                value.grad += slope if "lora_A" in name else slope.T

    def allocate(self, optimizer: torch.optim.Optimizer) -> None:
        """peft's allocation after the step, its memory taken from the optimizer's state and put back there."""
        states: dict[str, Any] = {name: optimizer.state[value] for name, value in self.params.items()}
        allocator = self.base.rankallocator
        step = max(int(state["step"]) for state in states.values())
        for name, state in states.items():
            for memory, key in ((allocator.exp_avg_ipt, _NOW), (allocator.exp_avg_unc, _SPREAD)):
                memory[name] = state.get(key, torch.zeros_like(self.params[name]))
            allocator.ipt[name] = allocator.exp_avg_ipt[name]  # peft asks whether it is there and computes it anew
        kept = {name: state[_KEPT].bool().tolist() for name, state in states.items() if _KEPT in state}
        if kept:
            self.config.rank_pattern = kept
        if any(value.grad is None for value in self.params.values()):
            return
        self.base.update_and_allocate(step)
        for name, state in states.items():
            if name in allocator.exp_avg_ipt:
                state[_NOW], state[_SPREAD] = allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name]
        for name, mask in (self.config.rank_pattern or {}).items():
            states[name][_KEPT] = torch.tensor(mask, dtype=torch.float32, device=self.params[name].device)


def settle_ranks(model: Any) -> None:
    """Before saving: peft cuts the file down to the ranks of the last allocation. Where a rank has come back to life
    since then (training stopped before the ranks were final), all ranks are kept instead."""
    config = model.peft_config["default"]
    pattern = getattr(config, "rank_pattern", None) if config.peft_type == "ADALORA" else None
    if not pattern:
        return
    values = {name.removesuffix(".default"): value for name, value in model.base_model.model.named_parameters()}
    for name, mask in pattern.items():
        kept = torch.tensor(mask, dtype=torch.bool)
        if bool((values[name.removesuffix(".default")].detach().cpu().view(-1)[~kept] != 0).any()):
            config.rank_pattern = None
            return
