"""Tiny models that embed, match and write (composed of a dual encoder, BLIP, BLIP-2), or fill in hidden words."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from mmft.backbones.joint import compose_blip, compose_joint
from tests.families.tiny import shrink
from tests.objectives.pairs import tiny_dual
from tests.runs import workshop
from tests.tiny import BOS, END, SIDE, tiny_tokenizer

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}


def templated() -> Any:
    """The tiny tokenizer with a start and an end token around every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 24
    ends = [(word, tokenizer.convert_tokens_to_ids(word)) for word in (BOS, END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A {END}", special_tokens=ends)
    return tokenizer


def pictures() -> Any:
    """Image processor of the tiny models."""
    square = {"height": SIDE, "width": SIDE}
    return transformers.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)


def spread(model: Any, std: float = 0.08) -> Any:
    """Random weights large enough that heads differ between rows."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, std)
    return model


@functools.cache
def templated_dual(kind: str = "dual") -> Path:
    """`tiny_dual` with a tokenizer that puts tokens around texts."""
    folder = workshop() / f"templated-{kind}"
    source = tiny_dual(kind)
    transformers.AutoModel.from_pretrained(source).save_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(source)
    type(processor)(image_processor=pictures(), tokenizer=templated()).save_pretrained(folder)
    return folder


@functools.cache
def tiny_joint(kind: str = "dual") -> Path:
    """Folder of a `JointModel` over a tiny dual encoder."""
    source = templated_dual(kind)
    torch.manual_seed(0)
    dual = transformers.AutoModel.from_pretrained(source)
    processor = transformers.AutoProcessor.from_pretrained(source)
    return compose_joint(dual, processor, workshop() / f"joint-{kind}", layers=1)


def blip_config() -> Any:
    """A tiny BLIP config."""
    return shrink("blip", text_config=IDS | {"vocab_size": 288}, image_text_hidden_size=16)


@functools.cache
def tiny_blip() -> Path:
    """Folder of a tiny `BlipForImageTextRetrieval`."""
    folder = workshop() / "blip-itm"
    torch.manual_seed(0)
    spread(transformers.BlipForImageTextRetrieval(blip_config())).save_pretrained(folder)
    transformers.BlipProcessor(pictures(), templated()).save_pretrained(folder)
    return folder


@functools.cache
def tiny_blip_joint() -> Path:
    """Folder of a `BlipJointModel` of two tiny upstream models."""
    torch.manual_seed(1)
    writer = spread(transformers.BlipForConditionalGeneration(blip_config()))
    reader = transformers.BlipForImageTextRetrieval.from_pretrained(tiny_blip())
    processor = transformers.BlipProcessor(pictures(), templated())
    return compose_blip(reader, writer, processor, workshop() / "blip-joint")


@functools.cache
def tiny_blip2() -> Path:
    """Folder of a tiny `Blip2ForImageTextRetrieval`."""
    folder = workshop() / "blip2-itm"
    torch.manual_seed(0)
    config = shrink("blip-2", num_query_tokens=3, image_text_hidden_size=16, image_token_index=None)
    config.qformer_config.vocab_size = 288
    config.qformer_config.use_qformer_text_input = True
    model = spread(transformers.Blip2ForImageTextRetrieval(config))
    model.save_pretrained(folder)
    transformers.BlipProcessor(pictures(), templated()).save_pretrained(folder)
    return folder


MASKED = {"vilt": "ViltForMaskedLM", "bridgetower": "BridgeTowerForMaskedLM", "flava": "FlavaForPreTraining"}


@functools.cache
def tiny_masked(kind: str) -> Path:
    """Folder of a tiny model with a masked language modelling head: one of `MASKED`."""
    folder = workshop() / f"masked-{kind}"
    changes: dict[str, Any] = {}
    if kind == "bridgetower":
        changes = {"hidden_size": 64, "num_hidden_layers": 2, "text_config": {"hidden_size": 64, "pad_token_id": 0}}
        changes["vision_config"] = {"hidden_size": 64}
    if kind == "flava":
        one = {"hidden_size": 64, "num_attention_heads": 4}  # its heads take the towers' widths for one
        changes = {"init_codebook": False, "hidden_size": 64, "multimodal_config": one, "image_config": one}
    torch.manual_seed(0)
    model = spread(getattr(transformers, MASKED[kind])(shrink(kind, **changes)))
    model.save_pretrained(folder)
    tokenizer = templated()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    wraps = {"vilt": transformers.ViltProcessor, "bridgetower": transformers.BridgeTowerProcessor}
    eyes: Any = pictures()
    if kind == "vilt":
        eyes = transformers.ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=8)
    wraps.get(kind, transformers.FlavaProcessor)(eyes, tokenizer).save_pretrained(folder)
    return folder
