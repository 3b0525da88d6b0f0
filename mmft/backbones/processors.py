"""A processor for models composed of any two: their folders often hold its halves without naming a class."""

from __future__ import annotations

from typing import Any

from mmft.backbones.classes import is_composed

_MEDIA = ("image_processor", "feature_extractor")


def whole_processor(found: Any, config: Any, target: str, *, revision: str | None) -> Any:
    """`found` (what AutoProcessor gave), or for a composed model that lacks a half in it, one of both halves.

    `target` is what `from_pretrained` is given. Where a half is missing there, `found` comes back.
    """
    from transformers import (
        AutoFeatureExtractor,
        AutoImageProcessor,
        AutoTokenizer,
        VisionTextDualEncoderProcessor,
        Wav2Vec2Processor,
    )

    if (
        not is_composed(config)
        or hasattr(found, "tokenizer")
        and any(getattr(found, name, None) is not None for name in _MEDIA)
    ):
        return found

    def load(loader: Any) -> Any:
        try:
            return loader.from_pretrained(target, revision=revision, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
            return None

    tokenizer = found if hasattr(found, "pad_token_id") else load(AutoTokenizer)
    if tokenizer is None:
        return found
    pictures = load(AutoImageProcessor)
    if pictures is not None:
        return VisionTextDualEncoderProcessor(image_processor=pictures, tokenizer=tokenizer)
    sound = load(AutoFeatureExtractor)
    return found if sound is None else Wav2Vec2Processor(feature_extractor=sound, tokenizer=tokenizer)
