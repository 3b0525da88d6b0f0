"""Tiny models, rows and optimizer steps for the tests of packing."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import load_backbone
from mmft.data.collate import Batch
from mmft.data.loader import assemble
from mmft.data.order import StepPlan
from mmft.data.render import Renderer
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.fast import packing, shared_prefix
from mmft.fast.plan import FastPlan, Setting, Work, fast_plan, install
from mmft.objectives.build import build_sft
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import AdapterSection, ModelSection, ObjectiveSection
from tests.runs import workshop
from tests.tiny import COLOURS, SIDE, save_tiny_vlm, tiny_config, tiny_processor

ROWS = 16
KNOWN = (packing.CANDIDATE, shared_prefix.CANDIDATE)


@functools.cache
def folder(kind: str) -> Path:
    """A tiny model's folder; `window` is a llava on a Mistral with a sliding window of 8 tokens."""
    path = workshop() / f"packs-{kind}"
    if kind != "window":
        return save_tiny_vlm(path, kind)
    import transformers

    config = tiny_config("llava")
    text = config.text_config.to_dict()
    text.pop("model_type")
    config.text_config = transformers.MistralConfig(**{**text, "sliding_window": 8})
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(path)
    tiny_processor("llava").save_pretrained(path)
    return path


def adapted(kind: str, *, dtype: str = "float32", attention: str = "sdpa", **adapter: Any) -> Adapted:
    """A fresh model with LoRA whose B is not zero."""
    section = ModelSection(name_or_path=str(folder(kind)), dtype=dtype, attn_implementation=attention)  # type: ignore[arg-type]
    backbone = load_backbone(section)
    targets = (
        ("language.attention", "language.mlp")
        if kind == "mllama"
        else ("language.attention", "language.mlp", "projector")
    )
    made = build_adapters(backbone, AdapterSection(targets=targets, lora_rank=4, **adapter), seed=0)
    source = torch.Generator().manual_seed(1)
    for name, value in made.trainable().items():
        if "lora_B" in name:
            value.data = 0.05 * torch.randn(value.shape, generator=source)
    return made


@functools.cache
def _png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), list(COLOURS.values())[number]).save(out, "PNG")
    return out.getvalue()


def samples(seed: int, *, bare: bool = True, longest: int = 40) -> list[Sample]:
    """Rows of random lengths; some with the same picture, and with `bare` some without one or with two."""
    source, found = random.Random(seed), []
    for number in range(ROWS):
        pictures = [source.randrange(4) for _ in range(source.choice((0, 1, 1, 2)) if bare else 1)]
        question = "".join(source.choice("abcdef gh") for _ in range(source.randint(2, longest)))
        answer = "".join(source.choice("xyz ") for _ in range(source.randint(1, 20)))
        pieces = (*(Piece("image") for _ in pictures), Piece("text", question))
        media = tuple(MediaRef("image", data=_png(one)) for one in pictures)
        found.append(Sample(f"r{number}", (Turn("user", pieces), Turn("assistant", (Piece("text", answer),))), media))
    return found


@dataclass(frozen=True)
class Step:
    """One optimizer step: mean loss, gradients in a row, supervised tokens, tokens that the model saw, forwards."""

    loss: float
    gradient: torch.Tensor
    count: int
    tokens: int
    forwards: int


def setting(model: Adapted, rows: Sequence[Sample], steps: StepPlan, **train: Any) -> Setting:
    """What `holds` and `install` look at."""
    fields = {"train": train} if train else {}
    recipe = load_recipe({"name": "x", "model": "shipped:nano-vlm", "data": {"train": "shipped:y"}, **fields})
    return Setting(recipe, model, Renderer(model.backbone.processor, max_length=512), rows, steps=steps)


def put_in(here: Setting) -> tuple[FastPlan, Work]:
    """Packing and shared prefixes, as a run puts them in."""
    renderer = here.renderer
    assert isinstance(renderer, Renderer)
    work = Work(here.adapted, build_sft(ObjectiveSection(), here.adapted.model), renderer, steps=here.steps)
    return install(fast_plan(here, KNOWN), here, work, KNOWN)


def plain(here: Setting) -> Work:
    """What a plain run works with."""
    assert here.renderer is not None
    return Work(here.adapted, build_sft(ObjectiveSection(), here.adapted.model), here.renderer, steps=here.steps)


def batches_of(here: Setting, work: Work, number: int = 0) -> list[Batch]:
    """The forwards of a step over all ranks."""
    assert work.steps is not None
    micros = [work.steps.micro_batch_at(number, index) for index in range(work.steps.micro_per_step)]
    return [
        assemble(work.renderer, [(here.samples[row], epoch) for row, epoch in micro.rows], pad_token_id=0)
        for micro in micros
        if micro.rows
    ]


def take(here: Setting, work: Work, number: int = 0, *, backwards: bool = False) -> Step:
    """Gradients of an optimizer step (its forwards in the other order with `backwards`)."""
    model, batches = here.adapted, batches_of(here, work, number)
    model.model.zero_grad()
    total, count = 0.0, sum(batch.supervised for batch in batches)
    for batch in reversed(batches) if backwards else batches:
        inputs = {
            name: value.to(model.backbone.model.dtype) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        loss = work.objective.loss(model.model, replace(batch, inputs=inputs))
        (loss.sum / count).backward()
        total += float(loss.sum.detach())
    gradient = torch.cat([value.grad.flatten() for value in model.trainable().values() if value.grad is not None])
    tokens = sum(batch.labels.numel() for batch in batches)
    return Step(total / count, gradient.clone(), count, tokens, len(batches))


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """Relative distance."""
    return float((one - two).norm() / two.norm())
