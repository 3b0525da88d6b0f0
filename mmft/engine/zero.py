"""DeepSpeed's ZeRO-3 for the frozen language layers: its own cuts, gathers and prefetch, and nothing else of it.

`deepspeed.initialize` is given no optimizer (its "ZeRO-Inference"), and each layer as a `_Unit`: a module that names
the layer's frozen weights alone and passes DeepSpeed's hooks on to the layer. What is trained DeepSpeed never sees, so
optimizer, clipping, guards and checkpoints are mmft's. Numbers are those of whole layers: a gather copies bytes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.errors import Problem, RecipeError

SWITCH = "ACCELERATE_USE_DEEPSPEED"
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_PREFIX = "ACCELERATE_DEEPSPEED_"
_OFFLOAD = "OFFLOAD_PARAM_DEVICE"
_NUMBERS = (
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
READ = ("stage", "offload_param", "overlap_comm", *_NUMBERS)
"""What of `zero_optimization` in a file of DeepSpeed's is read: when weights are gathered and let go, and where a share
lies. None of it changes a number."""
_SMALL = ("steps_per_print", "wall_clock_breakdown")
_RECIPE = "the recipe says it (train: optim, max_grad_norm, effective_batch_size, bf16, lr_scheduler_type ...)"


def wrong(found: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Where and why the launcher's variables ask for what is not built."""
    asked = {name: found.get(_PREFIX + name, "").lower() for name in ("ZERO_STAGE", "ZERO3_INIT", _OFFLOAD)}
    optimizer = found.get(f"{_PREFIX}OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
    reasons = [
        (
            not found.get(FILE) and asked["ZERO_STAGE"] != "3",
            f"{_PREFIX}ZERO_STAGE",
            f"for ZeRO stage {asked['ZERO_STAGE'] or '2'}: stages 1 and 2 cut up optimizer and gradients of what is "
            "trained, which of adapters are small, and on which exact resume rests; stage 3 is used for frozen weights",
        ),
        (
            asked["ZERO3_INIT"] == "true",
            f"{_PREFIX}ZERO3_INIT",
            "to load the base already cut up; every rank of mmft loads it onto the host and keeps a share",
        ),
        (optimizer != "none", f"{_PREFIX}OFFLOAD_OPTIMIZER_DEVICE", "to keep the optimizer in the host's memory"),
        (
            asked[_OFFLOAD] not in ("", "none", "cpu"),
            _PREFIX + _OFFLOAD,
            f"to keep the shares on {asked[_OFFLOAD]}, which mmft does not train with",
        ),
        ("ACCELERATE_GRADIENT_CLIPPING" in found, "ACCELERATE_GRADIENT_CLIPPING", f"to clip gradients: {_RECIPE}"),
        (
            found.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            f"to accumulate: {_RECIPE}",
        ),
        (importlib.util.find_spec("deepspeed") is None, "extra deepspeed", "for DeepSpeed, which is not installed"),
    ]
    return [(where, why) for bad, where, why in reasons if bad]


def settings(found: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """DeepSpeed's configuration: that of the launcher's variables, or the read part of the file they name.

    Raises RecipeError for a setting of the file that would be left out; "auto" says nothing and is left to DeepSpeed.
    """
    if found.get(FILE):
        zero = _file(Path(found[FILE]).expanduser())
    else:  # a layer is let go after each use: by its own default DeepSpeed would keep those of a small base whole
        zero = {"stage": 3, "stage3_max_reuse_distance": 0}
        if found.get(_PREFIX + _OFFLOAD, "none").lower() == "cpu":
            zero["offload_param"] = {"device": "cpu"}
    # DeepSpeed would otherwise put a function of its own in the place of every product of the process.
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero | {"memory_efficient_linear": False}}


def _file(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text())
        zero = {name: value for name, value in given.pop("zero_optimization").items() if value != "auto"}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RecipeError(
            f"DeepSpeed's configuration {path} cannot be read: {type(error).__name__}: {error}",
            where=FILE,
            allowed='a JSON object with a section "zero_optimization"',
        ) from error
    device = (zero.get("offload_param") or {}).get("device", "none")
    strange = [(name, _RECIPE) for name, value in given.items() if name not in _SMALL and not _silent(value)]
    strange += [(f"zero_optimization.{name}", "not read by mmft") for name in zero.keys() - set(READ)]
    if zero.get("stage") != 3:
        strange.append(("zero_optimization.stage", f"{zero.get('stage')}; only 3 is used, for frozen weights"))
    if device not in ("none", "cpu"):
        strange.append(("zero_optimization.offload_param", f"device {device}; a share lies on the device or the host"))
    if strange:
        allowed = f"zero_optimization: {', '.join(READ)}; elsewhere only 'auto'"
        raise RecipeError(
            Problem(f"DeepSpeed's setting {name}: {why}", where=str(path), allowed=allowed, do="delete it there")
            for name, why in sorted(strange)
        )
    return zero


def _silent(value: object) -> bool:
    """Whether a setting says nothing: every value in it is "auto"."""
    if isinstance(value, Mapping):
        return all(name == "type" or _silent(one) for name, one in value.items())
    return value == "auto"


class _Unit(nn.Module):
    """A layer as DeepSpeed sees it: its weights that are cut up, by number, and a place for hooks, which run at the
    layer's own forward."""

    def __init__(self, layer: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)
        self._layer = (layer,)  # in a tuple: not a submodule

    def register_forward_pre_hook(self, hook: Any, **how: Any) -> Any:
        """DeepSpeed gathers here, and marks the inputs."""
        return self._layer[0].register_forward_pre_hook(lambda _, *given: hook(self, *given), **how)

    def register_forward_hook(self, hook: Any, **how: Any) -> Any:
        """DeepSpeed lets go here, and marks the outputs."""
        return self._layer[0].register_forward_hook(lambda _, *given: hook(self, *given), **how)


def cut(layers: Sequence[nn.Module], frozen: set[nn.Parameter], root: nn.Module, device: torch.device) -> None:
    """Cut the frozen weights of the layers up over all ranks, in place, each on its own: no device holds all of them.
    `root` is the module whose forward runs the layers."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(sys.stderr):  # where DeepSpeed's log then goes for good
        import deepspeed

        if device.type == "cpu":  # a kernel for sums between processes, compiled for a minute and not called here
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        chosen = settings()
        units = nn.ModuleList(_Unit(layer, [one for one in layer.parameters() if one in frozen]) for layer in layers)
        deepspeed.utils.set_z3_leaf_modules(units, [_Unit])
        deepspeed.zero.Init(module=units, config_dict_or_path=chosen)
        engine, *_ = deepspeed.initialize(model=units, config=chosen)
    coordinator = engine.optimizer.get_param_coordinator()
    # The engine takes its hooks away when it is dropped; this one lives as long as the model.
    root.register_forward_pre_hook(lambda *_, engine=engine: coordinator.reset_step())


def is_cut(model: nn.Module) -> bool:
    """Whether DeepSpeed cut weights of the model up."""
    return any(hasattr(value, "ds_tensor") for value in model.parameters())
