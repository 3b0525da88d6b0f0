"""What all sections of a recipe are made of: the closed, frozen pydantic base and the types of its fields."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PartName = Literal["vision", "audio", "projector", "cross_attention", "language", "head"]
DType = Literal["float32", "bfloat16", "float16"]
FastName = Literal[
    "kernel_caches",
    "frozen_no_graph",
    "head_rows",
    "head_in_forward",
    "last_layer",
    "feature_store",
    "packing",
    "shared_prefix",
    "lora_fused",
    "nf4_once",
    "norms_fused",
    "attention_products",
    "native_kernels",
]
"""Optimisations that `train.fast` can name; `mmft.fast.known` holds them."""
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """What all sections have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
