"""Tiny llava folders whose weights bitsandbytes has quantized on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmft.backbones.load import load_backbone
from mmft.recipe.schema import ModelSection, QuantizationSection
from tests.tiny import save_tiny_vlm

SECTIONS = {
    "nf4-double": QuantizationSection(load_in_4bit=True),
    "fp4": QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "int8": QuantizationSection(load_in_8bit=True),
}
KINDS = tuple(SECTIONS)


def save_quantized(folder: Path, kind: str) -> tuple[Path, Any]:
    """The folder (weights, processor, quantization_config) and the model it was saved from."""
    base = save_tiny_vlm(folder.parent / f"{folder.name}-base", "llava")
    backbone = load_backbone(ModelSection(name_or_path=str(base), dtype="bfloat16"), SECTIONS[kind])
    backbone.model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder, backbone.model
