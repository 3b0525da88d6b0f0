"""A reward model's folder as a reward: one number for each answer, from `AutoModelForSequenceClassification`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from mmft.backbones.reward_model import load_reward_model, pad_token
from mmft.data.collate import collate
from mmft.data.render import IGNORED, Rendered, Renderer
from mmft.data.sample import Piece, Sample, Turn
from mmft.errors import BackboneError, RecipeError
from mmft.objectives.online.rollout import Attempt

_NO_LIMIT = 1_000_000


def by_model(folder: str, *, rows: int = 16, device: Any = "cpu") -> Callable[[Sequence[Attempt]], list[float]]:
    """A reward that reads the model of `folder` once and judges `rows` answers in a forward, with its own processor.

    Raises RecipeError where there is no such folder, BackboneError for a model that gives more than one number.
    """
    if not (Path(folder).expanduser() / "config.json").is_file():
        raise RecipeError(
            f"'{folder}' is no model folder", where="objective.rewards", do="name a reward model's folder"
        )
    path = Path(folder).expanduser()
    processor = AutoProcessor.from_pretrained(path)
    model: Any = load_reward_model(path).to(device).eval()
    if model.config.num_labels != 1:
        raise BackboneError(
            f"the model gives {model.config.num_labels} numbers", where=folder, allowed="one", do="name a reward model"
        )
    renderer, pad = Renderer(processor, max_length=_NO_LIMIT), pad_token(processor)

    @torch.no_grad()
    def score(attempts: Sequence[Attempt]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(attempts), rows):
            made = [_cut(renderer.render(_as_answered(one))) for one in attempts[start : start + rows]]
            inputs = collate(made, pad_token_id=pad).inputs
            cast = {
                name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
            }
            found += model(**{name: value.to(device) for name, value in cast.items()}).logits[:, 0].float().tolist()
        return found

    return score


def _as_answered(attempt: Attempt) -> Sample:
    """The row with the sampled answer in the place of its own."""
    turns = attempt.sample.turns
    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    return dataclasses.replace(attempt.sample, turns=(*asked, Turn("assistant", (Piece("text", attempt.text),))))


def _cut(row: Rendered) -> Rendered:
    """Up to the last token of the answer, which a reward model looks at; templates may put more behind it."""
    length, end = len(row.input_ids), int((row.labels != IGNORED).nonzero()[-1]) + 1
    media = {
        name: value[:, :end] if not value.is_floating_point() and tuple(value.shape[:2]) == (1, length) else value
        for name, value in row.media.items()
    }
    return dataclasses.replace(row, input_ids=row.input_ids[:end], labels=row.labels[:end], media=media)
