"""Answers of a model to samples: batched generation that does not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmft.backbones.generation import base_model, check_quantized, end_tokens, evaluating, generation_config
from mmft.data.collate import Batch, collate
from mmft.data.render import Rendered, Renderer
from mmft.data.sample import Sample
from mmft.evaluation.sampling import NucleusDraws, Sampling

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Rows rendered (pictures decoded) before they are sorted by length; bounds memory for any size of set.
_WINDOW_BATCHES = 16


def generate_answers(
    model: nn.Module,
    processor: Any,
    renderer: Renderer,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    sampling: Sampling | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """One answer per sample, in the order of `samples`; `progress` is told how many rows were just done.

    Greedy (or beam) search, or with `sampling` draws from the nucleus, with a KV cache; end-of-answer tokens from the
    model's own generation config. Rows are sorted by length within windows of 16 batches, padded on the left, and put
    back in order. `model` may be a PeftModel; every module's training flag is as before afterwards. Raises
    BackboneError for 4-bit layers that would repack their weights in an eval forward, DataError for a row that cannot
    be rendered.
    """
    check_quantized(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    config = generation_config(model, tokenizer, max_new_tokens=max_new_tokens, num_beams=num_beams)
    answers: list[str] = [""] * len(samples)
    window = batch_size * _WINDOW_BATCHES
    # Not inference_mode: a buffer that a forward caches on the module would be unusable in a later backward.
    with evaluating(model), torch.no_grad():
        for start in range(0, len(samples), window):
            rendered = [renderer.prompt(sample) for sample in samples[start : start + window]]
            order = sorted(range(len(rendered)), key=lambda place: len(rendered[place].input_ids), reverse=True)
            for at in range(0, len(order), batch_size):
                places = order[at : at + batch_size]
                texts = _answer_batch(
                    model, tokenizer, config, rows=[rendered[place] for place in places], sampling=sampling, to=device
                )
                for place, text in zip(places, texts, strict=True):
                    answers[start + place] = text
                if progress is not None:
                    progress(len(places))
    return answers


def _answer_batch(
    model: nn.Module,
    tokenizer: Any,
    config: GenerationConfig,
    *,
    rows: Sequence[Rendered],
    sampling: Sampling | None,
    to: torch.device | str,
) -> list[str]:
    """Decoded continuations of one left-padded batch."""
    pad = config.pad_token_id
    assert isinstance(pad, int)
    batch: Batch = collate(rows, pad_token_id=pad, side="left").to(to)
    dtype = float_dtype(model)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.inputs.items()}
    answering: Any = model  # nn.Module's own annotations take `generate` for a tensor
    generated: torch.Tensor = answering.generate(**inputs, generation_config=config, **_drawn(rows, sampling))
    new = generated[:, inputs["input_ids"].shape[1] :].tolist()
    return [text.strip() for text in tokenizer.batch_decode(ended(new, config), skip_special_tokens=True)]


def _drawn(rows: Sequence[Rendered], sampling: Sampling | None) -> dict[str, Any]:
    """The further argument of `generate` that makes it draw."""
    from transformers import LogitsProcessorList

    if sampling is None:
        return {}
    return {"logits_processor": LogitsProcessorList([NucleusDraws(sampling, [row.id for row in rows])])}


def ended(rows: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Each row up to its first end token, without it.

    transformers' beam search fills finished rows with the end token when the pad token's id is 0 (`pad or end`); an end
    token that is no special token would then be read as part of the answer, as often as the batch is longer.
    """
    ends = end_tokens(config)
    return [row[: next((place for place, token in enumerate(row) if token in ends), len(row))] for row in rows]


def float_dtype(model: nn.Module) -> torch.dtype:
    """Type of the base's first floating weight: processors give float32, 16-bit towers do not all cast."""
    adapters = ("lora_", "modules_to_save")
    for name, weight in base_model(model).named_parameters():
        if weight.is_floating_point() and not any(word in name for word in adapters):
            return weight.dtype
    return torch.float32
