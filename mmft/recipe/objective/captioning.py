"""What captioning reads."""

from __future__ import annotations

from mmft.recipe.section import Section


class CaptioningFields(Section):
    """Fields of objectives that write a text about a picture or a sound."""

    prompt: str = ""
    """A text before the caption, without loss: read by the encoder (Florence-2), else by the decoder."""
