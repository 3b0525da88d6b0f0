"""Fusion of text, pictures, videos, sound and tables in one transformers model, known to the auto classes on import."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoProcessor

from mmft.fusion.config import FusionConfig
from mmft.fusion.late import fit_stacking
from mmft.fusion.model import FusionModel, FusionOutput
from mmft.fusion.processor import FusionProcessor
from mmft.fusion.tabular import TableSchema

AutoConfig.register(FusionConfig.model_type, FusionConfig, exist_ok=True)
AutoModel.register(FusionConfig, FusionModel, exist_ok=True)
AutoProcessor.register(FusionConfig, FusionProcessor, exist_ok=True)

__all__ = ["FusionConfig", "FusionModel", "FusionOutput", "FusionProcessor", "TableSchema", "fit_stacking"]
