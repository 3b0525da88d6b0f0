"""Captions of a model to pictures (or sounds): greedy, beam and nucleus search through the model's own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList

from mmft.backbones.generation import base_model, check_quantized, evaluating, generation_config
from mmft.data.captions import CaptionRenderer
from mmft.data.sample import Sample
from mmft.evaluation.generate import ended, float_dtype
from mmft.evaluation.sampling import NucleusDraws, Sampling

_DROPS_LAST = ("blip",)
"""Families whose `generate` takes the last token of the prompt away: they expect the tokenizer's end token there."""


def generate_captions(
    model: nn.Module,
    renderer: CaptionRenderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    sampling: Sampling | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One caption for each sample, in their order; `progress` is told how many rows were just done.

    `sampling` draws from the nucleus, a function of (seed, row); without it the search is greedy, or a beam. `model`
    may be a PeftModel; every module's training flag is as before afterwards. Raises DataError for a picture that cannot
    be read.
    """
    check_quantized(model)
    config: Any = generation_config(model, renderer.tokenizer, max_new_tokens=max_new_tokens, num_beams=num_beams)
    stop = config.eos_token_id
    config.eos_token_id = sorted({*(stop if isinstance(stop, list) else [stop]), renderer.end} - {None})
    answers: list[str] = []
    # Not inference_mode: a buffer that a forward caches on the module would be unusable in a later backward.
    with evaluating(model), torch.no_grad():
        for start in range(0, len(samples), batch_size):
            chosen = samples[start : start + batch_size]
            answers += _caption_batch(model, renderer, config, samples=chosen, sampling=sampling, to=device)
            if progress is not None:
                progress(len(chosen))
    return answers


def _caption_batch(
    model: nn.Module,
    renderer: CaptionRenderer,
    config: GenerationConfig,
    *,
    samples: Sequence[Sample],
    sampling: Sampling | None,
    to: torch.device | str,
) -> list[str]:
    inputs, begin = renderer.prompts(samples)
    if getattr(base_model(model).config, "model_type", "") in _DROPS_LAST:
        for name, fill in (("input_ids", renderer.end), ("attention_mask", 1)):
            value = inputs[name]
            inputs[name] = torch.cat((value, value.new_full((len(value), 1), fill)), 1)
    dtype = float_dtype(model)
    inputs = {key: (value.to(dtype) if value.is_floating_point() else value).to(to) for key, value in inputs.items()}
    draws = [] if sampling is None else [NucleusDraws(sampling, [sample.id for sample in samples])]
    answering: Any = model  # nn.Module's own annotations take `generate` for a tensor
    rows = answering.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList(draws)).tolist()
    # Some return what generation began with, some (Whisper) the new tokens alone.
    new = [row[len(begin) :] if row[: len(begin)] == begin else row for row in rows]
    return [text.strip() for text in renderer.tokenizer.batch_decode(ended(new, config), skip_special_tokens=True)]
