"""Nucleus sampling whose draws belong to a row: neither the batch nor its order changes an answer.

The Gumbel-max rule (Gumbel 1954): with noise g_v = -log(-log u_v), argmax_v of (s_v / T + g_v) over the nucleus is a
draw from softmax(s / T) restricted to it. The nucleus is the smallest set of most probable tokens that hold `top_p`
together (Holtzman et al. 2020). The noise is a function of (seed, row, step), so greedy search over noisy scores
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from mmft.recipe.schema import EvaluateSection
from mmft.seeds import fold


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: share of probability kept, temperature, seed."""

    top_p: float = 1.0
    temperature: float = 1.0
    seed: int = 0


def sampling_of(section: EvaluateSection, seed: int) -> Sampling | None:
    """The draws a recipe asks for; None where it does not."""
    return None if section.top_p is None else Sampling(section.top_p, section.temperature, seed)


def nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which of the tokens (rows, vocabulary) are in the nucleus; the most probable one always is."""
    ordered, places = scores.sort(dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    kept = before < top_p
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, places, kept)


class NucleusDraws(LogitsProcessor):
    """The scores of the nucleus with the rows' noise, minus infinity elsewhere; made for one batch, in its order."""

    def __init__(self, sampling: Sampling, rows: Sequence[str]) -> None:
        self.sampling = sampling
        self.rows = tuple(rows)
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(rows, vocabulary) in float32, whose argmax is the draw of this step."""
        warm = scores.float() / self.sampling.temperature
        kept = nucleus(warm, self.sampling.top_p)
        noise = torch.stack([self._noise(row, warm.shape[-1]) for row in self.rows]).to(warm.device)
        self.step += 1
        return (warm + noise).masked_fill(~kept, float("-inf"))  # type: ignore[return-value]

    def _noise(self, row: str, size: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(fold(self.sampling.seed, "sampling", row, self.step))
        uniform = torch.rand(size, generator=source, dtype=torch.float64).clamp_min(1e-300)
        return (-(-uniform.log()).log()).float()
