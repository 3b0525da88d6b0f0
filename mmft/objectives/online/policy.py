"""Log-probabilities (and values) of sampled answers under the model that is trained, pictures encoded once."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.backbones.generation import base_model
from mmft.data.collate import Batch, collate
from mmft.data.prompts import PromptBatch, answered
from mmft.data.render import IGNORED
from mmft.objectives.base import StepContext
from mmft.objectives.online.formulas import token_log_probs
from mmft.objectives.online.sampling import Drawn, runs_tower_once
from mmft.objectives.sft import head_on_rows

_PIXELS = ("pixel_values", "pixel_values_images", "image_patches")
"""The names under which families take pictures that are not encoded."""


@dataclass(frozen=True)
class Scored:
    """`log_probs` (N, C), and `values` (N, C) where there is a value head; 0 outside of the mask."""

    log_probs: Tensor
    values: Tensor | None


class ValueHead(nn.Module):
    """One number for each hidden state, in float32; it starts at 0 everywhere."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: Tensor) -> Tensor:
        """(..., hidden) -> (...)."""
        return states.float() @ self.weight + self.bias


class Policy:
    """The model seen as a distribution over answers, at the sampler's temperature."""

    def __init__(
        self,
        model: nn.Module,
        *,
        head: nn.Module,
        pad_token_id: int,
        temperature: float = 1.0,
        value_head: ValueHead | None = None,
    ) -> None:
        self.model: Any = model
        self.head, self.value_head = head, value_head
        self.pad_token_id, self.temperature = pad_token_id, temperature
        self.shares = runs_tower_once(model)

    def rows(self, batch: PromptBatch, drawn: Drawn) -> Batch:
        """Questions with their answers, padded on the right, labels on the answers."""
        k = len(drawn.tokens) // len(batch.rows)
        made = [answered(batch.rows[place // k], drawn.answer(place)) for place in range(len(drawn.tokens))]
        return collate(made, pad_token_id=self.pad_token_id)

    def score(self, batch: PromptBatch, rows: Batch, mask: Tensor, *, step: StepContext) -> Scored:
        """Log-probabilities of all answers of a batch. `rows` is what `rows` made of the batch."""
        placed = step.place(rows)
        targets = placed.labels[:, 1:]
        chosen = F.pad(targets != IGNORED, (0, 1), value=False)
        states: list[Tensor] = []
        handle = self.head.register_forward_hook(lambda _, args, out: states.append(args[0]))
        try:
            with step.autocast(), head_on_rows(self.head, chosen):
                inputs = self._encoded(batch, placed, step)
                logits = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        wanted = targets[targets != IGNORED]
        found = token_log_probs(logits.reshape(-1, logits.shape[-1]), wanted, temperature=self.temperature)
        values = None
        if self.value_head is not None:
            values = _spread(self.value_head(states[0].reshape(len(wanted), -1)), mask)
        return Scored(_spread(found, mask), values)

    def reference(self, batch: PromptBatch, rows: Batch, mask: Tensor, *, step: StepContext) -> Tensor | None:
        """Log-probabilities with the adapter switched off; None where it cannot be."""
        if not hasattr(self.model, "disable_adapter"):
            return None
        off: AbstractContextManager[Any] = self.model.disable_adapter()
        with torch.no_grad(), off:
            return self.score(batch, rows, mask, step=step).log_probs

    def _encoded(self, batch: PromptBatch, rows: Batch, step: StepContext) -> dict[str, Any]:
        """The inputs of all rows, their pictures encoded once for all answers of a question where the family can."""
        pixels = [name for name in _PIXELS if name in rows.inputs]
        k = len(rows.labels) // len(batch.rows)
        if not self.shares or not pixels or k == 1:
            return dict(rows.inputs)
        base: Any = base_model(self.model)
        prompts = step.place(batch).inputs
        encode = base.base_model.get_image_features
        taken = [name for name in inspect.signature(encode).parameters if name in prompts]
        features = {"image": encode(**{name: prompts[name] for name in taken}, return_dict=True)}
        features = base._expand_multimodal_outputs(prompts["input_ids"], features, expand_size=k)
        kept = {name: value for name, value in rows.inputs.items() if name not in pixels}
        return {**kept, "mm_encoder_outputs": features}


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the mask's true places, in their order, as (N, C) with 0 elsewhere."""
    where = mask.to(values.device)
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)
