"""Late fusion: every modality has a head of its own, and their outputs are combined.

With outputs `o_m` (B, O) of the modality heads and `a` a share over the modalities that a row has (over all where it
has none):

- average: `o = sum_m a_m o_m`, a_m equal (logarithmic opinion pool with equal weights, Heskes 1998);
- learned: the same with `a = softmax(w)`;
- stacking: `o = S [o_1; ...; o_M] + c` (Wolpert 1992), S and c fitted afterwards on held-out rows by `fit_stacking`;
  until then they average. A missing modality speaks by its missing vector's outputs;
- hybrid: `o = a_0 o_0 + sum_m a_m o_m` with `o_0` the head on the fused vector, `a = softmax(w)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mmft.errors import RecipeError
from mmft.fusion.config import FusionConfig
from mmft.fusion.features import Features, share
from mmft.fusion.heads import Head, loss_of


class LateFusion(nn.Module):
    """Heads of the modalities and the rule that combines them; also the home of the heads of auxiliary losses."""

    stack_weight: Tensor
    stack_bias: Tensor

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count, outputs = len(config.modalities), config.num_outputs
        self.shape = (count, outputs)
        self.rule = config.late_rule if config.strategy == "late" else config.strategy
        self.heads = nn.ModuleList(Head(config) for _ in range(count))
        if self.rule == "learned":
            self.weights = nn.Parameter(torch.zeros(count))
        elif self.rule == "hybrid":
            self.weights = nn.Parameter(torch.zeros(count + 1))
        elif self.rule == "stacking":
            self.register_buffer("stack_weight", self.average())
            self.register_buffer("stack_bias", torch.zeros(outputs))

    def average(self) -> Tensor:
        """The stacking weights that average, (O, M O)."""
        return torch.eye(self.shape[1]).repeat(1, self.shape[0]) / self.shape[0]

    def outputs(self, features: Sequence[Features]) -> Tensor:
        """Each modality's own outputs, (B, M, O)."""
        return torch.stack([head(one.pooled) for head, one in zip(self.heads, features, strict=True)], dim=1)

    def combine(self, outputs: Tensor, present: Tensor, fused: Tensor | None = None) -> Tensor:
        """(B, M, O), present (B, M) and, for hybrid, the fused head's (B, O) -> (B, O)."""
        if self.rule == "stacking":
            return outputs.flatten(1) @ self.stack_weight.T + self.stack_bias
        if self.rule == "hybrid":
            assert fused is not None, "hybrid fusion has a head on the fused vector"
            outputs = torch.cat((fused.unsqueeze(1), outputs), dim=1)
            present = torch.cat((torch.ones_like(present[:, :1]), present), dim=1)
        weights = self.weights if self.rule != "average" else outputs.new_zeros(outputs.shape[1])
        return torch.einsum("bm,bmo->bo", share(weights, present), outputs)


def fit_stacking(
    late: LateFusion, config: FusionConfig, outputs: Tensor, *, labels: Tensor, l2: float = 1e-3, steps: int = 200
) -> float:
    """Fit the stacking layer on the modality outputs (N, M, O) of rows that the heads were *not* trained on (`labels`
    (N,) or (N, C)) and store it in `late`; the loss per counted label that it reaches, without the penalty.

    Minimises `loss / count + l2 |S - average|^2` by L-BFGS in float64: convex without focal loss, so the start does
    not matter. Raises RecipeError when the model's rule is not stacking.
    """
    if late.rule != "stacking":
        raise RecipeError(
            f"the model's late_rule is {late.rule}", where="late_rule", allowed="stacking", do="set late_rule: stacking"
        )
    held = outputs.detach().double().flatten(1)
    start = late.average().to(held)
    weight = start.clone().requires_grad_()
    bias = torch.zeros(outputs.shape[2], dtype=torch.float64, device=held.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        total, count = loss_of(config, held @ weight.T + bias, labels)
        return total / max(count, 1)

    def closure() -> float:
        solver.zero_grad()
        value = objective() + l2 * ((weight - start) ** 2).sum()
        value.backward()
        return cast(float, value)

    solver.step(closure)
    with torch.no_grad():
        late.stack_weight.copy_(weight)
        late.stack_bias.copy_(bias)
        return float(objective())
