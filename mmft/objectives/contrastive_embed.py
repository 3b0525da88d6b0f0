"""Embeddings of any dual encoder of transformers, by its own accessors, with the scale and bias of its logits.

embed(model, batch, "text")      -> (texts, width), of length one
sides(model)                     -> ("image", "text") or ("audio", "text")
logit_terms(model)               -> Terms(left, right, bias): what similarities are multiplied with and shifted by
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmft.errors import BackboneError

Side = Literal["image", "text", "audio"]
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs of a text tower; `attention_mask` is the text's also where an audio accessor has a parameter of that name."""
LARGEST_SCALE = 100.0
"""exp(logit_scale) is held at or below this (Radford et al. 2021, 2.5)."""
_SCALES = ("logit_scale", "logit_scale_a", "logit_scale_t", "temperature")


@dataclass(frozen=True)
class Terms:
    """Factors of the similarities read from the left (picture, sound) and from the right (text); scalars with a graph.

    They differ in CLAP only, which has a scale for each direction. `bias` is 0 where the model has none.
    """

    left: Tensor
    right: Tensor
    bias: Tensor


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel; adapters sit in its layers."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def sides(model: nn.Module) -> tuple[Side, Side]:
    """(left, right): `image` or `audio`, and `text`. Raises BackboneError when the model is no dual encoder."""
    base = unwrapped(model)
    has = {side for side in ("image", "audio", "text") if hasattr(base, f"get_{side}_features")}
    if "text" in has and has & {"image", "audio"} and scales(base):
        return ("image" if "image" in has else "audio"), "text"
    raise BackboneError(
        f"{type(base).__name__} is no dual encoder: it has "
        + (f"features of {', '.join(sorted(has))} only" if len(has) < 2 else "no scale for its similarities"),
        where="objective.name: contrastive",
        allowed="CLIP, SigLIP, SigLIP 2, ALIGN, Chinese CLIP, AltCLIP, CLAP, VisionTextDualEncoder and their like",
        do="choose a dual encoder, or objective.name: sft for a model that writes text",
    )


def embed(model: nn.Module, inputs: Mapping[str, Tensor], side: Side) -> Tensor:
    """Embeddings (rows, width) of length one, as the model's own forward makes them before it multiplies; float32
    from the projection on, whatever the towers compute in.

    `inputs` may hold more than one side's tensors; each side takes what its accessor has a parameter for. Raises
    BackboneError when the model has no such side.
    """
    base = unwrapped(model)
    accessor = getattr(base, f"get_{side}_features", None)
    if accessor is None:
        raise BackboneError(
            f"{type(base).__name__} has no {side} side", where=f"embed(side={side!r})", do="ask for a side it has"
        )
    known = _parameters(f"get_{side}_features", kind=type(base))
    chosen = {key: value for key, value in inputs.items() if key in known and (key in TEXT_KEYS) == (side == "text")}
    found = accessor(**chosen)
    if not isinstance(found, Tensor):
        found = found.pooler_output
    if found.dim() != 2:
        raise BackboneError(
            f"{type(base).__name__}.get_{side}_features gives features of shape {tuple(found.shape)}",
            allowed="one vector for each row",
            do="choose towers that pool (TimmWrapperConfig with do_pooling: true)",
        )
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return found / found.norm(p=2, dim=-1, keepdim=True)


def similarity(left: Tensor, right: Tensor) -> Tensor:
    """(n, m) cosines in float32 or wider; of several queries the best one counts (BLIP-2, arXiv 2301.12597, 3.2)."""
    wide = torch.promote_types(left.dtype, torch.float32)
    found = left.to(wide) @ right.to(wide).T
    return found.amax(dim=1) if left.dim() == 3 else found


def _parameters(name: str, *, kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(getattr(kind, name)).parameters) - {"self", "kwargs"}


def scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale and bias parameters of a dual encoder by their names in it (`logit_scale`, `logit_bias`, ...); a model
    composed around one holds them in its `dual`."""
    base = unwrapped(model)
    inner = getattr(base, "dual", None)
    own = dict((base if inner is None else inner).named_parameters(recurse=False))
    ahead = "" if inner is None else "dual."
    return {ahead + name: own[name] for name in (*_SCALES, "logit_bias") if name in own}


def logit_terms(model: nn.Module) -> Terms:
    """The model's factors and bias in float32, as its forward applies them.

    ALIGN divides by `temperature`, all others multiply by `exp(logit_scale)`; CLAP has one for each direction.
    """
    found = {name.rpartition(".")[2]: value for name, value in scales(model).items()}
    if "temperature" in found:
        left = right = 1.0 / _wide(found["temperature"])
    else:
        names = [name for name in found if name != "logit_bias"]
        left, right = (_wide(found[names[end]]).exp() for end in (0, -1))
    bias = _wide(found["logit_bias"]) if "logit_bias" in found else left.new_zeros(())
    return Terms(left, right, bias)


def _wide(value: Tensor) -> Tensor:
    """A scalar in float32, or float64 if it is that."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).reshape(())


@torch.no_grad()
def clamp_scales(weights: Mapping[str, Tensor]) -> None:
    """Hold the factors among `weights` (by parameter name) at or below `LARGEST_SCALE`, in place.

    Done after an update, as CLIP does it: a clamp inside of the forward would cut the gradient, and a scale beyond it
    would never come down again.
    """
    for name, value in weights.items():
        last = name.rpartition(".")[2]
        if last == "temperature":
            value.clamp_(min=1.0 / LARGEST_SCALE)
        elif last in _SCALES:
            value.clamp_(max=math.log(LARGEST_SCALE))
