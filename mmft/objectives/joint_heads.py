"""What a joint objective asks of a model: see a picture, read a text, match the two, write a text about a picture.

    heads = heads_of(model)            # of `JointModel`, `BlipJointModel`, BLIP's or BLIP-2's image-text retrieval
    seen = heads.see(pixel_values)     # Seen(embeds, tokens)
    heads.match(seen.tokens, ids, mask), heads.write(seen.tokens, ids, mask)

Every method computes what the class's own forward computes; adapters sit in its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmft.backbones.joint import SCALE, BlipJointModel, JointModel, unit
from mmft.errors import BackboneError
from mmft.objectives.contrastive_embed import Terms, logit_terms, unwrapped

TERMS: tuple[str, ...] = ("contrastive", "matching", "caption")


@dataclass(frozen=True)
class Seen:
    """`embeds` (n, w) of length one, or (n, queries, w) where a picture has several; `tokens` (n, t, width)."""

    embeds: Tensor
    tokens: Tensor


class Heads(Protocol):
    """The three heads of one model. `terms`: those of `TERMS` that it has."""

    terms: tuple[str, ...]

    def see(self, pixel_values: Tensor) -> Seen:
        """Pictures."""
        ...

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(m, w) embeddings of texts, of length one."""
        ...

    def match(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(k, 2) logits of pairs; column 1: they belong together."""
        ...

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(k, T, vocabulary) logits; those at t speak of the token at t + 1."""
        ...

    @property
    def head(self) -> nn.Module:
        """The layer that turns the decoder's states into logits over the vocabulary."""
        ...

    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        """(n, T) ids of captions made with `generate`'s options; padded behind the first end token."""
        ...

    @property
    def end(self) -> int:
        """The token that ends a caption."""
        ...

    def scale(self) -> Terms:
        """Factors of the similarities."""
        ...


def heads_of(model: nn.Module) -> Heads:
    """The heads of a model, through a PeftModel. Raises BackboneError when it has none."""
    base = unwrapped(model)
    if isinstance(base, JointModel):
        return _Composed(base)
    if isinstance(base, BlipJointModel):
        return _BlipWriter(base)
    if type(base).__name__ == "BlipForImageTextRetrieval":
        return _Blip(base)
    if type(base).__name__ == "Blip2ForImageTextRetrieval":
        return _Blip2(base)
    raise BackboneError(
        f"{type(base).__name__} has no head that matches a picture with a text",
        where="objective.name",
        allowed="BlipForImageTextRetrieval, Blip2ForImageTextRetrieval, mmft's JointModel (over any dual encoder) and "
        "BlipJointModel",
        do="give a dual encoder (CLIP, SigLIP, VisionTextDualEncoder, ...): a joint or dual run puts a decoder on it",
    )


class _Composed:
    """`JointModel`."""

    terms: tuple[str, ...] = TERMS

    def __init__(self, base: JointModel) -> None:
        self.base = base

    def see(self, pixel_values: Tensor) -> Seen:
        return Seen(*self.base.see(pixel_values))

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return unit(self.base.get_text_features(input_ids, attention_mask).pooler_output)

    def match(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.base.match(tokens, input_ids, attention_mask)

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.base.write(tokens, input_ids, attention_mask)

    @property
    def head(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.base.speak(tokens, **options)

    @property
    def end(self) -> int:
        return int(self.base.config.end_token_id)

    def scale(self) -> Terms:
        return logit_terms(self.base)


class _Blip:
    """`BlipForImageTextRetrieval`: its forward with and without `use_itm_head`; the scale is fixed, it has none."""

    terms: tuple[str, ...] = TERMS[:2]

    def __init__(self, base: Any) -> None:
        self.base = base

    def see(self, pixel_values: Tensor) -> Seen:
        tokens = self.base.vision_model(pixel_values=pixel_values).last_hidden_state
        return Seen(unit(self.base.vision_proj(tokens[:, 0])), tokens)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.base.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return unit(self.base.text_proj(states[:, 0]))

    def match(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.base.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=_ones(tokens),
        ).last_hidden_state
        return self.base.itm_head(states[:, 0])

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raise _mute(self.base)

    @property
    def head(self) -> nn.Module:
        raise _mute(self.base)

    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        raise _mute(self.base)

    @property
    def end(self) -> int:
        raise _mute(self.base)

    def scale(self) -> Terms:
        return _fixed(self.base)


class _BlipWriter(_Blip):
    """`BlipJointModel`: the decoder starts with its own token instead of the encoder's first."""

    terms: tuple[str, ...] = TERMS

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = input_ids.clone()
        ids[:, 0] = self.base.config.text_config.bos_token_id
        return self.base.text_decoder(
            input_ids=ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=_ones(tokens),
            use_cache=False,
        ).logits

    @property
    def head(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        return self.base.speak(tokens, **options)

    @property
    def end(self) -> int:
        return int(self.base.config.text_config.sep_token_id)

    def scale(self) -> Terms:
        return logit_terms(self.base)


class _Blip2:
    """`Blip2ForImageTextRetrieval`: query embeddings of the Q-Former; its matching head averages over the queries."""

    terms: tuple[str, ...] = TERMS[:2]

    def __init__(self, base: Any) -> None:
        self.base = base

    def _queries(self, rows: int) -> Tensor:
        return self.base.query_tokens.expand(rows, -1, -1)

    def see(self, pixel_values: Tensor) -> Seen:
        tokens = self.base.vision_model(pixel_values=pixel_values).last_hidden_state
        states = self.base.qformer(
            query_embeds=self._queries(len(tokens)),
            encoder_hidden_states=tokens,
            encoder_attention_mask=_ones(tokens),
        ).last_hidden_state
        return Seen(unit(self.base.vision_projection(states.to(self.base.vision_projection.weight.dtype))), tokens)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.base.embeddings(input_ids=input_ids)
        states = self.base.qformer(
            query_embeds=embedded, query_length=0, attention_mask=attention_mask
        ).last_hidden_state
        return unit(self.base.text_projection(states[:, 0].to(self.base.text_projection.weight.dtype)))

    def match(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        queries = self._queries(len(tokens))
        states = self.base.qformer(
            query_embeds=self.base.embeddings(input_ids=input_ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=torch.cat([_ones(queries), attention_mask], dim=1),
            encoder_hidden_states=tokens,
            encoder_attention_mask=_ones(tokens),
        ).last_hidden_state
        states = states[:, : queries.shape[1]].to(self.base.itm_head.weight.dtype)
        return self.base.itm_head(states).mean(dim=1)

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raise _mute(self.base)

    @property
    def head(self) -> nn.Module:
        raise _mute(self.base)

    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        raise _mute(self.base)

    @property
    def end(self) -> int:
        raise _mute(self.base)

    def scale(self) -> Terms:
        return _fixed(self.base)


def _mute(base: Any) -> NotImplementedError:
    return NotImplementedError(f"{type(base).__name__} does not write")


def _ones(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def _fixed(base: Any) -> Terms:
    first = next(base.parameters())
    value = torch.tensor(SCALE, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))
    return Terms(value, value, torch.zeros_like(value))
