"""The parts of any vision-language model, found by structure: no table of model families.

Sources, in this order: transformers' accessors (`get_encoder(modality)`, `get_decoder`, `get_input_embeddings`,
`get_output_embeddings`), the config tree and the declared input modalities of the sub-models, and names only where
the first two say nothing. What lies beside the towers and the language model is the projector.

Every module and parameter belongs to exactly one part and one sub-part; a name belongs where its longest known
prefix belongs. Tied weights are counted once, with the token embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.recipe.check import PARTS, SUBPARTS

__all__ = ["PARTS", "SUBPARTS", "Parts", "count", "find_parts", "is_linear", "owners", "size"]

_ATTENTION = re.compile(r"(^|_)(attn|attention|crossattention)|attn$|attention$", re.IGNORECASE)
_MLP = re.compile(
    r"(^|_)(mlp|mlps|ffn|feed_forward|feedforward|moe|experts?|intermediate|fc\d?)(_|\d|$)", re.IGNORECASE
)
_EMBED = re.compile(r"embed|(^|_)wte$|(^|_)wpe$", re.IGNORECASE)
_CROSS = re.compile(r"cross_?attn|cross_?attention|encoder_attn|enc_?dec_?attention", re.IGNORECASE)
_BRIDGE = re.compile(
    r"merger|project|resampl|perceiver|connector|align|qformer|multi_?modal|visual_embed", re.IGNORECASE
)
_VISION_KEYS = re.compile(r"vision|visual|image|video|vq", re.IGNORECASE)
_AUDIO_KEYS = re.compile(r"audio|speech", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """Where the names of one model belong.

    `roots` maps module-name prefixes to parts ("" is the model itself), `subs` module names to sub-parts,
    `linear` the names of layers that an adapter can sit on to (part, sub-part), `experts` the names of parameters
    that hold a stack of expert matrices (three dimensions), which no adapter here can sit on. `names` are the parts
    that own at least one parameter, in the order of `PARTS`; `tied_head`: the head's weight is the token table.
    """

    roots: Mapping[str, str] = field(repr=False)
    subs: Mapping[str, str] = field(repr=False)
    linear: Mapping[str, tuple[str, str]] = field(repr=False)
    experts: Mapping[str, tuple[str, str]] = field(repr=False)
    tied_head: bool
    names: tuple[str, ...] = ()

    def part_of(self, name: str) -> str:
        """The part of a module or parameter name, as in `model.named_modules()` / `named_parameters()`."""
        prefix = name
        while prefix not in self.roots:
            prefix = prefix.rpartition(".")[0]
        return self.roots[prefix]

    def subpart_of(self, name: str) -> str:
        """The sub-part of a module or parameter name; a parameter belongs with the module that owns it."""
        prefix = name
        while prefix and prefix not in self.subs:
            prefix = prefix.rpartition(".")[0]
        return self.subs.get(prefix, "other")

    def linears(self, part: str, sub: str | None = None) -> list[str]:
        """Names of the layers of `part` (and `sub`) that LoRA can sit on, in the model's order."""
        return [name for name, home in self.linear.items() if home[0] == part and sub in (None, home[1])]


def find_parts(model: Any) -> Parts:
    """Parts of a `PreTrainedModel` (on any device, quantized or not, without adapters). Milliseconds."""
    names = _Names(model)
    roots = _towers(model, names)
    roots.update(_language(model, names, roots))
    roots.update(_bridges(model, names, roots))
    roots.update(_heads(model, names))
    roots.setdefault("", "projector" if any(part != "head" for part in roots.values()) else "language")
    roots.update(_cross_attention(names, roots))
    subs = {name: _subpart(name, names) for name in names.modules}
    draft = Parts(roots, subs, {}, {}, False)
    linear = {
        name: (draft.part_of(name), subs[name])
        for name, module in names.modules.items()
        if is_linear(module) and not isinstance(names.modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    }
    experts = {
        name: (draft.part_of(name), draft.subpart_of(name))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] > 1 and _holds_experts(names.modules[name.rpartition(".")[0]])
    }
    present = {draft.part_of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return Parts(roots, subs, linear, experts, _is_tied(model), tuple(part for part in PARTS if part in present))


def is_linear(module: nn.Module) -> bool:
    """True for the layers LoRA can sit on: linear ones (quantized too) and convolutions of one pixel."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, (nn.Linear, Conv1D))


def owners(model: nn.Module, parts: Parts) -> dict[str, tuple[str, nn.Parameter]]:
    """Every parameter once: name -> (part, parameter). A tied weight goes by its name outside the head."""
    first: dict[int, str] = {}
    found: dict[str, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = parts.part_of(name)
        known = first.get(id(parameter))
        if known is not None:
            if not (found[known][0] == "head" and part != "head"):
                continue
            del found[known]
        first[id(parameter)] = name
        found[name] = (part, parameter)
    return found


def size(parameter: nn.Parameter) -> int:
    """Number of weights, also where four-bit weights are packed two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def count(model: nn.Module, parts: Parts) -> dict[str, dict[str, int]]:
    """part -> parameters (tied ones once), modules, linears. The parameters add up to those of the model."""
    rows = {part: {"parameters": 0, "modules": 0, "linears": len(parts.linears(part))} for part in parts.names}
    for name, _ in model.named_modules():
        part = parts.part_of(name)
        if name and part in rows:
            rows[part]["modules"] += 1
    for part, parameter in owners(model, parts).values():
        rows[part]["parameters"] += size(parameter)
    return rows


class _Names:
    """The model's modules by name and back."""

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._back = {id(module): name for name, module in self.modules.items()}

    def of(self, module: Any) -> str | None:
        """Name of a module object; None for no module, a foreign one and the model itself."""
        return (self._back.get(id(module)) or None) if isinstance(module, nn.Module) else None

    def children(self, name: str) -> Iterable[str]:
        prefix = f"{name}." if name else ""
        return [prefix + child for child, _ in self.modules[name].named_children()]


def _ask(model: Any, accessor: str, *arguments: Any) -> Any:
    """An accessor's answer; None where the family does not implement it (they raise, in four different ways)."""
    try:
        return getattr(model, accessor)(*arguments)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        return None


def _inside(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.") or root == ""


def _ancestors(name: str) -> list[str]:
    """Proper ancestors, nearest first, without the model itself."""
    found = []
    while "." in name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found


def _is_tied(model: Any) -> bool:
    head, table = _head(model), _ask(model, "get_input_embeddings")
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(table, "weight", None)


def _head(model: Any) -> Any:
    found = _ask(model, "get_output_embeddings")
    if found is None:
        decoder = _ask(model, "get_decoder")
        found = _ask(decoder, "get_output_embeddings") if decoder is not model else None
    return found


def _towers(model: Any, names: _Names) -> dict[str, str]:
    """Encoders of other modalities: the accessors' answers, then sub-models by config and by declared input."""
    asked = [_ask(model, accessor) for accessor in ("get_input_embeddings", "get_decoder")]
    anchors = [anchor for module in asked if (anchor := names.of(module))]
    found: dict[str, str] = {}

    def add(name: str | None, part: str) -> None:
        if name is None or any(_inside(anchor, name) for anchor in anchors):
            return
        if not any(_inside(name, known) for known in found):
            found[name] = part

    for modality, part in (("image", "vision"), ("video", "vision"), ("audio", "audio")):
        add(names.of(_ask(model, "get_encoder", modality)), part)
    configs = _modal_configs(model.config)
    for name, module in names.modules.items():
        if name and hasattr(module, "input_modalities"):
            modality_part = configs.get(type(module.config)) or _declared(module)
            if modality_part and not any(_BRIDGE.search(step) for step in name.split(".")):
                add(name, modality_part)
    return found


def _modal_configs(config: Any) -> dict[type, str]:
    """Types of the sub-configs that are named after a modality."""
    found: dict[type, str] = {}
    for key in getattr(config, "sub_configs", None) or ():
        sub = getattr(config, key, None)
        part = "vision" if _VISION_KEYS.search(key) else "audio" if _AUDIO_KEYS.search(key) else None
        if sub is not None and part and not isinstance(sub, dict) and type(sub) is not type(config):
            found[type(sub)] = part
    return found


def _declared(module: Any) -> str | None:
    """The modality that a sub-model says it reads, when it reads no text."""
    declared = module.input_modalities
    reads = {declared} if isinstance(declared, str) else set(declared or ())
    if not reads or "text" in reads:
        return None
    return "vision" if reads & {"image", "video"} else "audio" if "audio" in reads else None


def _language(model: Any, names: _Names, towers: Mapping[str, str]) -> dict[str, str]:
    """Roots of the language model: the largest modules around decoder, text encoder and token table that hold
    no tower and are not the base model (whose other children are the projector)."""
    base = names.of(getattr(model, "base_model", None))
    found: dict[str, str] = {}
    decoder = _ask(model, "get_decoder")
    for module in (decoder, _ask(model, "get_encoder"), _ask(model, "get_input_embeddings")):
        name = names.of(module)
        if name is None or any(_inside(name, tower) for tower in towers):
            continue
        top = None
        for step in (name, *_ancestors(name)):
            if any(_inside(tower, step) for tower in towers) or (step == base and step != name):
                break
            top = step
        if top is None:  # it holds a tower: the decoder itself is the container, an encoder is looked into
            top = name if module is decoder else None
        if top is not None and not any(_inside(top, known) for known in found):
            found[top] = "language"
    if not found and decoder is model:
        found[""] = "language"
    return found


def _bridges(model: Any, names: _Names, roots: Mapping[str, str]) -> dict[str, str]:
    """Projectors that do not lie beside the language model: inside a tower (`visual.merger`) or inside a language
    model that holds its towers itself."""
    towers = [name for name, part in roots.items() if part in ("vision", "audio")]
    languages = [name for name, part in roots.items() if part == "language"]
    found: dict[str, str] = {}
    for language in languages:
        if any(_inside(tower, language) for tower in towers):
            for child in names.children(language):
                if child not in roots and _BRIDGE.search(child.rpartition(".")[2]):
                    found[child] = "projector"
    beside = any(
        not any(_inside(name, root) or (root and _inside(root, name)) for root in roots if root)
        for name, module in names.modules.items()
        if name and not _is_head(names, name, model) and next(module.parameters(), None) is not None
    )
    if found or beside:
        return found
    for tower in towers:
        found.update(dict.fromkeys(_inner_bridges(model, names, tower), "projector"))
    return found


def _inner_bridges(model: Any, names: _Names, tower: str) -> list[str]:
    """Children of a tower, beside its layers, that are named as bridges or lead to the language model's width."""
    children = [child for child in names.children(tower) if next(names.modules[child].parameters(), None) is not None]
    named = [child for child in children if _BRIDGE.search(child.rpartition(".")[2])]
    if named:
        return named
    table = _ask(model, "get_input_embeddings")
    width = getattr(table, "embedding_dim", None)
    last = [child for child in children if not isinstance(names.modules[child], nn.ModuleList)][-1:]
    return [child for child in last if width is not None and _leads_to(names.modules[child], width)]


def _leads_to(module: nn.Module, width: int) -> bool:
    """True when the module's linear layers end at `width` and start at another one (a pooler keeps its width)."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return bool(layers) and layers[-1].out_features == width != layers[0].in_features


def _is_head(names: _Names, name: str, model: Any) -> bool:
    return any(_inside(name, root) for root in _heads(model, names))


def _heads(model: Any, names: _Names) -> dict[str, str]:
    """The vocabulary head with what belongs to it alone (a transform before it), never with layers or the table."""
    name = names.of(_head(model))
    if name is None:
        return {}
    table = names.of(_ask(model, "get_input_embeddings"))
    top = name
    for step in _ancestors(name):
        holds_layers = any(isinstance(module, nn.ModuleList) for module in names.modules[step].modules())
        if holds_layers or (table and _inside(table, step)):
            break
        top = step
    return {top: "head"}


def _cross_attention(names: _Names, roots: Mapping[str, str]) -> dict[str, str]:
    """Layers of the language model that attend to something other than the text: the whole layer where it has no
    self-attention (mllama), else the cross-attending module alone."""
    draft = Parts(roots, {}, {}, {}, False)
    found: dict[str, str] = {}
    for name, module in names.modules.items():
        parent = names.modules.get(name.rpartition(".")[0])
        if not isinstance(parent, nn.ModuleList) or draft.part_of(name) != "language":
            continue
        holders = [n for n, m in module.named_children() if next(m.parameters(), None) is not None]
        norms = [n for n in holders if "norm" in type(getattr(module, n)).__name__.lower()]
        crossing = [n for n in holders if _CROSS.search(n) and n not in norms]
        others = [n for n in holders if _ATTENTION.search(n) and n not in crossing and n not in norms]
        if crossing and not others:
            found[name] = "cross_attention"
        else:
            found.update({f"{name}.{child}": "cross_attention" for child in crossing})
    return found


def _subpart(name: str, names: _Names) -> str:
    """norm where the module is one; else what the outermost telling module on its path is."""
    module = names.modules[name]
    if name and "norm" in type(module).__name__.lower():
        return "norm"
    for step in (*reversed(_ancestors(name)), name):
        here = names.modules[step]
        last = step.rpartition(".")[2]
        kind = type(here).__name__
        if isinstance(here, (nn.ModuleList, nn.ModuleDict)) or step == "":
            continue
        if isinstance(here, nn.Embedding) or (_EMBED.search(last) and not hasattr(here, "input_modalities")):
            return "embedding"
        if _ATTENTION.search(last) or kind.endswith("Attention"):
            return "attention"
        if _MLP.search(last) or kind.lower().endswith(("mlp", "experts", "moe", "feedforward")):
            return "mlp"
    parent = names.modules.get(name.rpartition(".")[0])
    grand = names.modules.get(name.rpartition(".")[0].rpartition(".")[0])
    # The second half of a BERT layer's feed-forward is called `output`; its first half was found by its name.
    if name.endswith(".output.dense") and grand is not None and hasattr(grand, "intermediate") and parent is not None:
        return "mlp"
    return "other"


def _holds_experts(owner: nn.Module) -> bool:
    kind = type(owner).__name__.lower()
    return "expert" in kind or "moe" in kind
