"""peft's LoRA layers with the autograd of `lora_linear`, in place and taken back without a trace.

A layer's class becomes a subclass of itself whose forward goes through `lora_linear`; names, state, `merge`,
`set_adapter` and `disable_adapter` stay peft's own. Layers of one parent that are given the same tensor (seen in one
forward of a real row) are computed at the first one's call, with x read and kept once. A gated block whose three layers
are LoRA layers becomes one node. Wherever the short way is not exactly peft's sum (no gradients wanted, adapters
switched off or merged, another active adapter, types that peft would mix), peft's forward runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmft.backbones.quantize import dequantized_weight
from mmft.fast.lora_gated import ACTS, Act, run_gated
from mmft.fast.lora_linear import Line, Stack, run_lines
from mmft.fast.swap import swapped

Call = tuple[str, Tensor, int]
GATED = ("gate_proj", "up_proj", "down_proj")


def is_four_bit(layer: nn.Module) -> bool:
    """True for bitsandbytes' 4-bit linear layer."""
    return type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes")


def why_not(layer: Any) -> str | None:
    """Why a LoRA layer of peft has to stay as it is; None when it need not."""
    base = layer.get_base_layer()
    if type(layer).__module__ not in ("peft.tuners.lora.layer", "peft.tuners.lora.bnb"):
        return f"peft's {type(layer).__name__}"
    if type(base) is not nn.Linear and not is_four_bit(base):
        return f"a base layer of type {type(base).__name__}"
    if not is_four_bit(base) and type(base.weight) is not nn.Parameter:
        return f"weights of type {type(base.weight).__name__}"
    if len(layer.lora_A) != 1 or layer.lora_variant or getattr(layer, "fan_in_fan_out", False):
        return "a variant of LoRA, or several adapters"
    (name,) = layer.lora_A
    inner = (base, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name])
    if layer.lora_B[name].bias is not None or base.weight.requires_grad or getattr(base.bias, "requires_grad", False):
        return "a trained bias or base weight"
    if not isinstance(inner[3], nn.Dropout | nn.Identity):
        return f"dropout of type {type(inner[3]).__name__}"
    if any(hasattr(one, "_hf_hook") or one._forward_hooks or one._forward_pre_hooks for one in inner):
        return "hooks on its inner layers"
    return None


def lora_layers_of(model: nn.Module) -> dict[str, Any]:
    """LoRA layers of peft by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


class Site:
    """What a fast layer needs: its line, the lines it shares x with, and outputs that wait for their turn."""

    def __init__(self, layer: Any) -> None:
        base, (name,) = layer.get_base_layer(), layer.lora_A
        drop = layer.lora_dropout[name]
        self.adapter = name
        self.four_bit = is_four_bit(base)
        self.line = Line(
            _reader(base),
            None if base.bias is None else base.bias.detach(),
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            drop.p if isinstance(drop, nn.Dropout) else 0.0,
        )
        self.sites: tuple[Site, ...] = (self,)
        self.stack = Stack([self.line])
        self.waiting: tuple[Any, int, Tensor] | None = None

    def join(self, others: Sequence[Site]) -> None:
        """Share x with `others`, this one being called first."""
        self.sites = tuple(others)
        self.stack = Stack([one.line for one in others])

    def run(self, x: Tensor, dtype: torch.dtype, training: bool) -> Tensor:
        """This layer's output, computing those that share x along with it."""
        if self.waiting is not None:
            seen, version, out = self.waiting
            self.waiting = None
            if seen() is x and version == x._version:
                return out
        if len(self.sites) == 1:
            return run_lines(x, self.stack, dtype=dtype, training=training)[0]
        first, *rest = run_lines(x, self.stack, dtype=dtype, training=training)
        for site, out in zip(self.sites[1:], rest, strict=True):
            site.waiting = (weakref.ref(x), x._version, out)
        return first


def _reader(base: Any) -> Callable[[torch.dtype], Tensor]:
    if is_four_bit(base):
        return lambda dtype: dequantized_weight(base, dtype)
    return lambda dtype: base.weight.detach().to(dtype)


def computed_in(layer: Any, x: Tensor) -> torch.dtype | None:
    """The type in which peft would compute all of this layer for x; None when the short way is not its sum."""
    site: Site = layer.mmft_site
    if not torch.is_grad_enabled() or layer.disable_adapters or layer.merged_adapters:
        return None
    if list(layer.active_adapters) != [site.adapter]:
        return None
    base = layer.get_base_layer()
    kind = x.device.type
    stored = base.compute_dtype if site.four_bit else base.weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return dtype if x.is_floating_point() and (not site.four_bit or stored == dtype) else None
    return x.dtype if x.dtype == stored == site.line.a.dtype else None


class _FastLayer:
    """Mixed in before a LoRA layer's class."""

    mmft_site: Site

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = None if args or kwargs else computed_in(self, x)
        if dtype is None:
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        return self.mmft_site.run(x, dtype, self.training)


class _FastBlock:
    """Mixed in before a gated block's class."""

    mmft_gated: tuple[Stack, Stack, Act]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers = [getattr(self, name) for name in GATED]
        dtype, *others = (None,) if args or kwargs else [computed_in(layer, x) for layer in layers]
        if dtype is None or any(other != dtype for other in others):
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        first, second, act = self.mmft_gated
        return run_gated(x, first, second, act, dtype=dtype, training=layers[0].training)


def put_in(layers: Mapping[str, Any]) -> Callable[[], None]:
    """Make layers (by name, all with `why_not` of None) fast; returns what takes it back."""
    was = [(layer, type(layer)) for layer in layers.values()]
    for layer, kind in was:
        layer.mmft_site = Site(layer)
        layer.__class__ = swapped(_FastLayer, kind)

    def take_back() -> None:
        for layer, kind in was:
            layer.__class__ = kind
            del layer.mmft_site

    return take_back


def watch(layers: Mapping[str, Any], run: Callable[[], Any]) -> list[Call]:
    """Calls of the layers during `run`, in order, with the tensor each was given (which the list keeps alive)."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: calls.append((name, args[0], args[0]._version))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def shared_inputs(calls: Sequence[Call]) -> list[list[str]]:
    """Names of layers of one parent that follow each other with the same tensor; layers called twice stay alone."""
    times: dict[str, int] = {}
    for name, _, _ in calls:
        times[name] = times.get(name, 0) + 1
    groups: list[list[str]] = []
    last: Call | None = None
    for call in calls:
        if times[call[0]] > 1:
            last = None
            continue
        same = last is not None and last[1] is call[1] and last[2] == call[2] and _parent(last[0]) == _parent(call[0])
        if same:
            groups[-1].append(call[0])
        else:
            groups.append([call[0]])
        last = call
    return [group for group in groups if len(group) > 1]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def join(layers: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> None:
    """Let layers share x as `shared_inputs` found."""
    for group in groups:
        layers[group[0]].mmft_site.join([layers[name].mmft_site for name in group])


def gated_blocks(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[tuple[str, Any, Act]]:
    """Blocks `down(act(gate(x)) * up(x))` whose three layers are in `layers`, seen by structure and then by number."""
    for name, block in model.named_modules():
        if not all(f"{name}.{part}" in layers for part in GATED) or not isinstance(
            getattr(block, "act_fn", None), nn.Module
        ):
            continue
        if block._forward_hooks or block._forward_pre_hooks or hasattr(block, "_hf_hook"):
            continue
        act = next((act for act in ACTS if _is_same_act(block.act_fn, act)), None)
        if act is not None and _is_gated(block, act):
            yield name, block, act


def _is_same_act(module: Any, act: Act) -> bool:
    x = torch.linspace(-6, 6, 97)
    return bool(torch.allclose(module(x), act.value(x), rtol=1e-5, atol=1e-6))


def _is_gated(block: Any, act: Act) -> bool:
    """One forward on random rows, adapters off."""
    gate, up, down = (getattr(block, name).get_base_layer() for name in GATED)
    dtype = gate.compute_dtype if is_four_bit(gate) else gate.weight.dtype
    source = torch.Generator().manual_seed(0)
    x = torch.randn((3, gate.in_features), generator=source).to(gate.weight.device, dtype)
    flags = [getattr(block, name)._disable_adapters for name in GATED]
    try:
        for name in GATED:
            getattr(block, name)._disable_adapters = True
        with torch.no_grad():
            given = block(x)
            ours = down(act.value(gate(x)) * up(x))
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for name, flag in zip(GATED, flags, strict=True):
            getattr(block, name)._disable_adapters = flag
    return bool(given.shape == ours.shape) and bool(torch.allclose(given, ours, rtol=0, atol=1e-6))


def put_in_blocks(model: nn.Module, layers: Mapping[str, Any]) -> tuple[int, Callable[[], None]]:
    """Make gated blocks of fast layers one node each; how many, and what takes it back."""
    was = []
    for _, block, act in gated_blocks(model, layers):
        lines = [getattr(block, name).mmft_site.line for name in GATED]
        block.mmft_gated = (Stack(lines[:2]), Stack(lines[2:]), act)
        was.append((block, type(block)))
        block.__class__ = swapped(_FastBlock, type(block))

    def take_back() -> None:
        for block, kind in was:
            block.__class__ = kind
            del block.mmft_gated

    return len(was), take_back
