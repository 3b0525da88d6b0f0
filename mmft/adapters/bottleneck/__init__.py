"""Bottleneck adapters, serial (Houlsby et al. 2019) and parallel (He et al. 2022), as a method that peft knows.

Importing this package registers peft type `BOTTLENECK`: after that `get_peft_model`, `PeftModel.from_pretrained`,
`load_adapter`, `set_adapter`, `disable_adapter` and `save_pretrained` of plain peft work with it. Price: one import
of peft.
"""

from __future__ import annotations

from mmft.adapters.bottleneck.blocks import bottleneck_modules, widths
from mmft.adapters.bottleneck.config import ACTIVATIONS, PLACEMENTS, BottleneckConfig, BottleneckType, bottleneck_config
from mmft.adapters.bottleneck.layer import BottleneckLayer
from mmft.adapters.bottleneck.model import PREFIX, BottleneckModel, register

__all__ = [
    "ACTIVATIONS",
    "PLACEMENTS",
    "PREFIX",
    "BottleneckConfig",
    "BottleneckLayer",
    "BottleneckModel",
    "BottleneckType",
    "bottleneck_config",
    "bottleneck_modules",
    "register",
    "widths",
]

register()
