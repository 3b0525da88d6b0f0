"""Answers drawn from the model: batched, with a KV cache, the vision tower once for each picture.

The loop is transformers' own `generate`, so every family's cache, positions and masks are right. The draw itself is
ours: a processor of logits leaves one token a row, chosen by the inverse of the distribution's cumulative sum at a
uniform number. These numbers are a function of (seed, step, sample, which of its answers), so neither resume, nor the
batch, nor the number of processes changes what is drawn (Monte Carlo by common random numbers).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmft.backbones.generation import base_model, check_quantized, end_tokens, evaluating, generation_config
from mmft.data.prompts import PromptBatch, prompt_batch
from mmft.data.render import media_token_ids
from mmft.objectives.base import StepContext
from mmft.seeds import generator


@dataclass(frozen=True)
class Drawn:
    """`answers` of each question: k in a row, padded to (N, C) with `mask`; `log_probs` and `entropy` (N, C) of the
    whole distribution at the sampler's temperature, and which answers `ended` by an end token."""

    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    ended: Tensor

    def answer(self, row: int) -> Tensor:
        """The tokens of one answer, its end token included."""
        return self.tokens[row][self.mask[row]]


class Sampler:
    """Draws answers from a model, at a temperature above 0. Placeholders of media are never drawn: an answer that held
    one could not be read again."""

    def __init__(
        self, model: nn.Module, processor: Any, *, longest: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        check_quantized(model)
        self.model: Any = model
        tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer, self.never = tokenizer, media_token_ids(processor)
        self.temperature, self.top_p = temperature, top_p
        self.config = generation_config(model, tokenizer, max_new_tokens=longest, num_beams=1)
        self.ends = torch.tensor(sorted(end_tokens(self.config)))
        self.longest = longest

    @torch.no_grad()
    def draw(self, batch: PromptBatch, *, k: int, step: StepContext, uniform: Tensor | None = None) -> Drawn:
        """k answers to each question, in the order of the questions. `uniform` (N, longest): None for the most likely
        token every time."""
        once = runs_tower_once(self.model)
        if k > 1 and not once:
            rows = [row for row in batch.rows for _ in range(k)]
            samples = [sample for sample in batch.samples for _ in range(k)]
            pad = self.config.pad_token_id
            assert isinstance(pad, int)
            batch = prompt_batch(rows, samples, pad_token_id=pad)
        inputs = step.place(batch).inputs
        choose = _Choose(self.temperature, self.top_p, uniform, self.never)
        with evaluating(self.model), step.autocast():
            # Sampling mode lets `generate` make several answers of a question; `choose` leaves it nothing to draw.
            out = self.model.generate(
                **inputs,
                generation_config=self.config,
                do_sample=True,
                temperature=1.0,
                num_return_sequences=k if once else 1,
                logits_processor=[choose],
            )
        tokens = out[:, inputs["input_ids"].shape[1] :].cpu()
        return self._drawn(tokens, choose)

    def _drawn(self, tokens: Tensor, choose: _Choose) -> Drawn:
        is_end = torch.isin(tokens, self.ends)
        before = is_end.cumsum(1) - is_end.long()
        mask = before == 0
        width = int(mask.sum(1).max())
        log_probs, entropy = (torch.stack(part, dim=1)[:, :width].cpu() for part in (choose.log_probs, choose.entropy))
        mask = mask[:, :width]
        return Drawn(tokens[:, :width], mask, log_probs * mask, entropy * mask, is_end.any(1))

    def texts(self, drawn: Drawn) -> list[str]:
        """Answers as texts, without special tokens."""
        inner = drawn.mask & ~torch.isin(drawn.tokens, self.ends)
        rows = [drawn.tokens[row][inner[row]].tolist() for row in range(len(inner))]
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def uniforms(ids: Sequence[str], *, k: int, longest: int, seed: int, step: int) -> Tensor:
    """(len(ids) * k, longest) numbers in [0, 1), each row a function of (seed, step, id, which answer) alone."""
    rows = []
    for name in ids:
        for which in range(k):
            source = generator(seed, "sample", step, name, which)
            rows.append([source.random() for _ in range(longest)])
    return torch.tensor(rows, dtype=torch.float64)


def runs_tower_once(model: nn.Module) -> bool:
    """Whether the model takes pictures that are encoded already (`mm_encoder_outputs`, transformers 5.20)."""
    base: Any = base_model(model)
    return "mm_encoder_outputs" in inspect.signature(base.forward).parameters and hasattr(
        base.base_model, "get_image_features"
    )


class _Choose:
    """A processor of logits that leaves one token a row and notes its log-probability."""

    def __init__(self, temperature: float, top_p: float, uniform: Tensor | None, never: Tensor) -> None:
        self.temperature, self.top_p, self.uniform, self.never = temperature, top_p, uniform, never
        self.log_probs: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs = (scores.float() / self.temperature).log_softmax(-1)
        probabilities = logs.exp()
        allowed = probabilities.index_fill(-1, self.never.to(scores.device), 0.0)
        if self.uniform is None:
            chosen = allowed.argmax(-1)
        else:
            chosen = inverse(kept(allowed, self.top_p), self.uniform[:, len(self.log_probs)].to(scores.device))
        self.log_probs.append(logs.gather(1, chosen[:, None])[:, 0])
        self.entropy.append(-(probabilities * logs).nan_to_num(0.0).sum(-1))
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


def kept(probabilities: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2020): the most likely tokens until their sum reaches `top_p`, others 0."""
    if top_p >= 1.0:
        return probabilities
    ordered, places = probabilities.sort(dim=-1, descending=True)
    out = ordered.cumsum(-1) - ordered >= top_p
    return torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(out, 0.0))


def inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at which the cumulative sum of its weights passes `uniform` times their total."""
    sums = weights.double().cumsum(-1)
    found = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).float().argmax(-1)  # rounding must not leave the support
    return torch.minimum(found, last)
