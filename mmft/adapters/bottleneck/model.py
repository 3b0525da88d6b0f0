"""The tuner: which modules are wrapped, and how peft gets to know the method."""

from __future__ import annotations

from typing import Any, ClassVar

import peft
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from mmft.adapters.bottleneck.blocks import widths
from mmft.adapters.bottleneck.config import BottleneckConfig, BottleneckType
from mmft.adapters.bottleneck.layer import BottleneckLayer, refuse_merge
from mmft.errors import AdapterError

PREFIX = "bottleneck_"


class BottleneckModel(BaseTuner):
    """peft's tuner for `BottleneckConfig`. Adapters can be added, switched, disabled, saved and loaded, not merged."""

    prefix: str = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]
    mergeable = False

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        config: BottleneckConfig = peft_config
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        self._refuse_nesting(target, current_key)
        sizes = widths(target, parent, current_key)
        new = BottleneckLayer(target, adapter_name, config, name=current_key, widths=sizes)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Swap one for the other; peft's own version also copies the weight of a linear layer, which a block has not.

        The adapter is on its device already (`BottleneckLayer.update_layer`).
        """
        setattr(parent, child_name, new_module)

    def _refuse_nesting(self, target: nn.Module, key: str) -> None:
        """Tensors inside a wrapped block change their names, so no adapter of any kind may lie in another one."""
        above = [key.rsplit(".", cut)[0] for cut in range(1, key.count(".") + 1)]
        outer = [name for name in above if isinstance(self.model.get_submodule(name), BottleneckLayer)]
        inner = any(isinstance(module, BaseTunerLayer) for module in target.modules())
        if outer or inner:
            raise AdapterError(
                f"target {key} lies inside {outer[0]}" if outer else f"target {key} holds adapters already",
                where="target_modules",
                allowed="blocks or linear layers that do not hold each other",
                do="name the outer or the inner one, not both",
            )

    def _check_merge_allowed(self) -> None:
        raise refuse_merge()


def register() -> None:
    """Make peft know the method. Safe to call again.

    `peft.utils.register_peft_method` refuses names that are not in peft's own enumeration, so this fills the three
    public tables which that function fills. Raises AdapterError when another package took the name.
    """
    configs: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: Any = peft.PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: Any = PEFT_TYPE_TO_PREFIX_MAPPING
    name = BottleneckType.BOTTLENECK
    if configs.get(name, BottleneckConfig) is not BottleneckConfig:
        raise AdapterError(
            f"this peft has a method {name.value} of its own ({configs[name].__module__})",
            where="peft.PEFT_TYPE_TO_CONFIG_MAPPING",
            do="use that one, or a release of peft without it",
        )
    configs[name], tuners[name], prefixes[name] = BottleneckConfig, BottleneckModel, PREFIX
