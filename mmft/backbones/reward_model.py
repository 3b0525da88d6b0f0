"""A reward model as a model of transformers: the backbone without its vocabulary head, and `score` on the last token.

`AutoModelForSequenceClassification.from_pretrained(folder)` loads it, for families that have no such class of their
own after `import mmft.backbones.reward_model` has made one (`enter`) or by `load_reward_model(folder)`. Rows end with
the answer's last token (its end-of-turn token), padded on the right with a token that is not that one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from mmft.errors import BackboneError


def reward_class(config: Any) -> type[PreTrainedModel]:
    """The class for a configuration: transformers' own, else one made by its generic recipe and entered in its table.

    Raises BackboneError for a family without a plain model.
    """
    kind = type(config)
    known: Any = AutoModelForSequenceClassification._model_mapping
    if kind in known:
        return known[kind]
    try:
        plain: Any = AutoModel._model_mapping[kind]  # type: ignore[attr-defined]
    except KeyError as error:
        raise BackboneError(
            f"{config.model_type} has no plain model in transformers, so no reward model can stand on it",
            where="objective.name: reward",
            do="use another backbone",
        ) from error
    parent = next(one for one in plain.__mro__[1:] if issubclass(one, PreTrainedModel))
    name = plain.__name__.removesuffix("Model") + "ForSequenceClassification"
    made = type(name, (GenericForSequenceClassification, parent), {"__module__": __name__, "config_class": kind})
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)
    return made


def enter(model_type: str) -> None:
    """Make `AutoModelForSequenceClassification` know a family."""
    reward_class(AutoConfig.for_model(model_type))


def write_reward_model(merged: Path, weight: torch.Tensor, processor: Any, folder: Path) -> None:
    """Write `folder` from a merged model's folder and the head's weight (1, hidden); the model is in memory for it."""
    config = AutoConfig.from_pretrained(merged)
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token(processor)
    made: Any = reward_class(config).from_pretrained(merged, config=config, dtype="auto")
    made.score.to(torch.float32)
    made.score.weight.data.copy_(weight)
    made.score.to(made.dtype)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_reward_model(folder: str | Path, **keywords: Any) -> PreTrainedModel:
    """The reward model of a folder; keywords as for `from_pretrained`."""
    config = AutoConfig.from_pretrained(folder)
    return reward_class(config).from_pretrained(folder, **keywords)


def pad_token(processor: Any) -> int:
    """The token that rows of a reward model are padded with: never the end-of-turn token, which is looked at."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    return next((int(one) for one in ids if one is not None and one != tokenizer.eos_token_id), 0)
