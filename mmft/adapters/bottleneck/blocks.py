"""Blocks: which modules are a sub-layer (attention, MLP) of a part, and how wide their inputs and outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmft.backbones.parts import Parts
from mmft.errors import AdapterError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def widths(module: nn.Module, parent: nn.Module | None = None, name: str = "") -> tuple[int, int]:
    """(in, out): the sizes of the last axis of what a module takes and returns, read off its weights.

    A linear layer says it. A block of a residual stream has the width of the norms beside it when its weights begin
    and end with that width; any other block goes from its first to its last linear layer. Raises AdapterError when
    none of these answers.
    """
    own = _linear(module)
    if own is not None:
        return own
    inner = [found for layer in module.modules() if (found := _linear(layer)) is not None]
    stacked = {size for value in module.parameters() if value.ndim == 3 for size in value.shape[1:]}
    matrices = {size for value in module.parameters() if value.ndim == 2 for size in value.shape}
    taken = {pair[0] for pair in inner} | stacked | matrices
    given = {pair[1] for pair in inner} | stacked
    stream = {size for size in _norm_widths(parent) if size in taken and size in given}
    if len(stream) == 1:
        return (width := stream.pop()), width
    if not inner:
        raise AdapterError(
            f"no bottleneck adapter fits {name or type(module).__name__} ({type(module).__name__}): it holds no "
            "linear layer that tells the width of its hidden state",
            where="target_modules",
            allowed="attention blocks, MLP blocks, linear layers",
            do="target a block or a linear layer (mmft inspect lists them)",
        )
    return inner[0][0], inner[-1][1]


def bottleneck_modules(parts: Parts, model: Any, part: str, sub: str, *, placement: str = "serial") -> tuple[str, ...]:
    """Names of the modules that a target `part.sub` means for bottleneck adapters, in the model's order.

    These are the largest modules that hold linear layers of that part and sub-part and nothing else: attention and
    MLP blocks, the projector as one. Where a sub-layer has no module of its own (`fc1` and `fc2` in the layer, BERT's
    `intermediate` and `output`), or its module adds the residual and normalizes (BERT's attention), a serial adapter
    sits on the linear layer that makes the output; a parallel one has no place there. Raises AdapterError then, and
    when the target holds no linear layer.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    held = _held(parts, modules)
    tops = _largest(parts, modules, held, home=(part, sub))
    if not tops:
        raise AdapterError(
            f"target '{part}.{sub}' holds no block for a bottleneck adapter",
            where="adapter.targets",
            allowed="sub-parts with linear layers, such as language.attention, language.mlp, vision.attention",
            do="run mmft inspect to see the parts",
        )
    layers: dict[str, list[str]] = {}
    for name in tops:
        layers.setdefault(_layer_of(name, modules), []).append(name)
    found: list[str] = []
    homeless: list[str] = []
    for members in layers.values():
        blocks, ends = _blocks(members, modules, held)
        found += blocks + ends
        homeless += ends
    if placement == "parallel" and homeless:
        raise AdapterError(
            f"'{part}.{sub}' has no module that takes the sub-layer's input and returns its output "
            f"({homeless[0]} only makes the output)",
            where="adapter.bottleneck_placement",
            allowed="serial",
            do="set bottleneck_placement: serial for this target",
        )
    return tuple(found)


def _linear(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _norm_widths(parent: nn.Module | None) -> set[int]:
    found = set()
    for child in parent.children() if parent is not None else ():
        weight = getattr(child, "weight", None)
        if _is_norm(child) and weight is not None and weight.ndim == 1:
            found.add(int(weight.shape[0]))
    return found


def _held(parts: Parts, modules: dict[str, nn.Module]) -> dict[str, set[tuple[str, str, str]]]:
    """Module name -> (part, sub-part, name) of every matrix inside: linear layers, experts, fused attention.

    Convolutions of one pixel, on which LoRA can sit, have their channels first and are not hidden states.
    """
    fused = {
        name: (parts.part_of(name), parts.subpart_of(name))
        for name, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
    }
    held: dict[str, set[tuple[str, str, str]]] = {}
    for name, home in {**parts.linear, **parts.experts, **fused}.items():
        if isinstance(modules.get(name), nn.Conv2d):
            continue
        here = name
        while here:
            held.setdefault(here, set()).add((*home, name))
            here = here.rpartition(".")[0]
    return held


def _largest(
    parts: Parts, modules: dict[str, nn.Module], held: dict[str, set[tuple[str, str, str]]], *, home: tuple[str, str]
) -> list[str]:
    """The largest callable modules that hold matrices of `home` and nothing but."""
    found: list[str] = []
    for name, module in modules.items():  # parents come first
        inside = held.get(name)
        if not inside or isinstance(module, _CONTAINERS) or (found and name.startswith(f"{found[-1]}.")):
            continue
        if parts.subpart_of(name) != home[1] or any(owner[:2] != home for owner in inside):
            continue
        values = (f"{name}.{value}" for value, _ in module.named_parameters())
        if all(parts.part_of(value) == home[0] for value in values):
            found.append(name)
    return found


def _layer_of(name: str, modules: dict[str, nn.Module]) -> str:
    """The layer a module belongs to: its nearest ancestor in a list, or its parent; itself below a whole model."""
    here = name
    while here:
        above = here.rpartition(".")[0]
        if here != name and isinstance(modules[above], nn.ModuleList):
            return here
        here = above
    parent = name.rpartition(".")[0]
    return name if isinstance(modules[parent], PreTrainedModel) else parent


def _blocks(
    members: Sequence[str], modules: dict[str, nn.Module], held: dict[str, set[tuple[str, str, str]]]
) -> tuple[list[str], list[str]]:
    """The sub-layers of one layer: modules from input to output, and linear layers that only make the output."""
    if len(members) == 1:
        name = _without_residual(members[0], modules, held)
        end = _normalized_end(name, modules, held)
        return ([], [end]) if end else ([name], [])
    sizes = {name: widths(modules[name], _parent(name, modules), name) for name in members}
    square = [name for name in members if sizes[name][0] == sizes[name][1] and _linear(modules[name]) is None]
    if square:  # what is narrower than the stream is a gate or a router beside the sub-layer
        width = max(sizes[name][0] for name in square)
        return [name for name in square if sizes[name][0] == width], []
    width = sizes[members[0]][0]
    ends = [name for name in members if sizes[name][0] != width == sizes[name][1]]
    return [], ends or [members[-1]]


def _parent(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def _without_residual(name: str, modules: dict[str, nn.Module], held: dict[str, set[tuple[str, str, str]]]) -> str:
    """T5's `layer.0` is norm, attention and residual in one: the sub-layer is the child that holds all matrices."""
    while any(_is_norm(child) for child in modules[name].children()):
        inner = [child for label, _ in modules[name].named_children() if held.get(child := f"{name}.{label}")]
        if len(inner) != 1 or _linear(modules[inner[0]]) is not None or isinstance(modules[inner[0]], _CONTAINERS):
            break
        name = inner[0]
    return name


def _normalized_end(name: str, modules: dict[str, nn.Module], held: dict[str, set[tuple[str, str, str]]]) -> str | None:
    """The output projection of a block whose last child is projection, residual and norm in one (BERT)."""
    children = dict(modules[name].named_children())
    inner = [label for label in children if held.get(f"{name}.{label}")]
    if len(inner) < 2 or any(_linear(children[label]) is not None for label in inner):
        return None
    width, last = widths(modules[name], None, name)[0], children[inner[-1]]
    ends = [label for label, child in last.named_children() if (_linear(child) or (0, 0))[1] == width]
    return f"{name}.{inner[-1]}.{ends[-1]}" if ends and width in _norm_widths(last) else None
