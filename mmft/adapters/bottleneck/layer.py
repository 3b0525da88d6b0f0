"""One wrapped sub-layer with its bottleneck adapters."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmft.adapters.bottleneck.config import ACTIVATIONS, BottleneckConfig
from mmft.errors import AdapterError

NOT_MERGEABLE = "a bottleneck adapter cannot be merged: no weight of the base can hold its activation function"
_DO = "keep the adapter beside the base and load both (PeftModel.from_pretrained), or train a LoRA adapter"


@dataclass(frozen=True)
class Settings:
    """What one adapter computes, beside its weights."""

    parallel: bool
    activation: str
    scaling: float


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base with adapters on it; `forward` takes and returns what the module takes and returns.

    The module may return a tensor or a tuple whose first element is the hidden state, of shape (..., out). Several
    active adapters add up: the parallel ones read the module's input, then the serial ones all read the module's
    output with the parallel part added. The sum is rounded once, to the type of the module's output.
    """

    adapter_layer_names = ("bottleneck_norm", "bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_settings")
    mergeable = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, *, name: str, widths: tuple[int, int]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = widths
        self.bottleneck_norm = nn.ModuleDict()
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_settings: dict[str, Settings] = {}
        self.merged_adapters = []
        self.bottleneck_name = name
        self.bottleneck_input = _first_parameter(base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        """Names of the wrapped block (`layer_idx`, `is_causal`, ...), which the code around it may ask for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Names with an underscore are hooks' own marks (accelerate's _hf_hook), which belong to one module only.
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add (or start again) the adapter of this name, on the device of the wrapped module."""
        parallel = config.placement == "parallel"
        width = self.in_features if parallel else self.out_features
        if config.layer_norm:
            self.bottleneck_norm[adapter_name] = nn.LayerNorm(width)
        self.bottleneck_down[adapter_name] = nn.Linear(width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, self.out_features)
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_settings[adapter_name] = Settings(parallel, config.activation, float(config.scaling))
        self.reset_parameters(adapter_name, zero=config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(
        self, adapter_name: str, *, generator: torch.Generator | None = None, zero: bool = True
    ) -> None:
        """down: uniform within 1/sqrt(fan_in), as LoRA's A; biases zero; up zero, so that the start is the identity.

        `zero=False` draws up like down. Draws come from `generator` (of the CPU), or torch's own.
        """
        for table, at_zero in ((self.bottleneck_down, False), (self.bottleneck_up, zero)):
            layer: Any = table[adapter_name]
            layer.bias.zero_()
            if at_zero or layer.weight.is_meta:
                layer.weight.zero_()
                continue
            bound = 1.0 / math.sqrt(layer.in_features)
            draw = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32)
            layer.weight.copy_((draw * 2.0 - 1.0) * bound)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output, its hidden state changed by the active adapters."""
        active = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not active:
            return self.base_layer(*args, **kwargs)
        parallel = [name for name in active if self.bottleneck_settings[name].parallel]
        deltas = []
        if parallel:  # before the module, which may change its input in place
            given = self._input(args, kwargs)
            deltas = [self._branch(name, given) for name in parallel]
        output = self.base_layer(*args, **kwargs)
        first = output[0] if type(output) in (tuple, list) and output else output
        if not isinstance(first, torch.Tensor):
            raise self._error(f"it returns {type(output).__name__}, not a tensor or a tuple that begins with one")
        hidden = first
        for delta in deltas:
            if delta.shape != first.shape:
                raise self._error(
                    f"a parallel adapter makes {tuple(delta.shape)} of its input, the module {tuple(first.shape)}"
                )
            hidden = hidden + delta
        serial = [self._branch(name, hidden) for name in active if name not in parallel]
        for delta in serial:
            hidden = hidden + delta
        hidden = hidden.to(first.dtype)
        return hidden if first is output else type(output)((hidden, *output[1:]))

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`scaling * up(dropout(activation(down(norm(x)))))` in the adapter's type."""
        settings, down, up = self.bottleneck_settings[name], self.bottleneck_down[name], self.bottleneck_up[name]
        if x.shape[-1] != down.in_features:
            raise self._error(f"its hidden state has width {x.shape[-1]}, the adapter was made for {down.in_features}")
        x = self._cast_input_dtype(x, next(down.parameters()).dtype)
        if name in self.bottleneck_norm:
            x = self.bottleneck_norm[name](x)
        inner = self.bottleneck_dropout[name](ACTIVATIONS[settings.activation](down(x)))
        return up(inner) * settings.scaling

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The module's first parameter, which is the hidden state, whether it is given by position or by name."""
        found = args[0] if args else kwargs.get(self.bottleneck_input or "")
        if not isinstance(found, torch.Tensor):
            raise self._error(f"its input '{self.bottleneck_input}' is no tensor, so nothing can run parallel to it")
        return found

    def _error(self, what: str) -> AdapterError:
        return AdapterError(
            f"no bottleneck adapter fits {self.bottleneck_name} ({type(self.base_layer).__name__}): {what}",
            where=self.bottleneck_name,
            allowed="modules from hidden state (..., in) to hidden state (..., out) or a tuple that begins with it",
            do="target another module, or the linear layer that makes the output",
        )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        """peft asks this of every layer; a block has no weight of its own, so its first parameters answer."""
        weights = list(base_layer.parameters())
        if not weights:
            return None, None
        floating = next((value.dtype for value in weights if value.dtype.is_floating_point), None)
        return weights[0].device, floating

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises AdapterError."""
        raise AdapterError(NOT_MERGEABLE, where=self.bottleneck_name, do=_DO)

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def refuse_merge() -> AdapterError:
    """The error of every way to merge."""
    return AdapterError(NOT_MERGEABLE, where="merge_and_unload", allowed="LoRA and other linear methods", do=_DO)


def _first_parameter(module: nn.Module) -> str | None:
    """Name of the first parameter of `forward`; None where it takes only `*args`."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return next((p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds), None)
