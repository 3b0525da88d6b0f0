"""Where the parts of a model begin: module-name prefixes of towers, language model, projector, head, cross-attention.

The one rule book of `parts.find_parts`; no family is named in it. See there for the order of the sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_ATTENTION = re.compile(r"(^|_)(attn|attention|crossattention)|attn$|attention$", re.IGNORECASE)
_CROSS = re.compile(
    r"cross_?attn|cross_?attention|^x_attn|encoder_attn|enc(oder)?_?dec(oder)?_?att(entio)?n", re.IGNORECASE
)
_CROSS_KIND = re.compile(r"CrossAttention$|MergedAttention$")
"""Classes that attend to other states where the module's name does not say so; a merged attention sees the decoder's
own states and the encoder's through the same projections."""
_BRIDGE = re.compile(
    r"merger|project|resampl|perceiver|connector|align|qformer|multi_?modal|visual_embed|^proj\d?$", re.IGNORECASE
)
_PATCHES = re.compile(r"patch_embed|embed_patches", re.IGNORECASE)
_HEADS = re.compile(r"(^|_)(head|classifier|out_proj|qa_outputs|score)$", re.IGNORECASE)
_VISION_KEYS = re.compile(r"vision|visual|image|video|vq|protein", re.IGNORECASE)
"""Sub-configs of picture encoders; the encoder of any other modality that is neither text nor sound goes with them."""
_AUDIO_KEYS = re.compile(r"audio|speech|acoustic|codec|talker|(token|code)2wav", re.IGNORECASE)
"""Sub-configs of sound: encoders, and the models that speak (a talker and its vocoder)."""
_MAIN_INPUT = {"pixel_values": "vision", "pixel_values_videos": "vision", "input_values": "audio"}
_MAIN_INPUT |= {"input_features": "audio"}


class Names:
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


def ask(model: Any, accessor: str, *arguments: Any) -> Any:
    """An accessor's answer; None where the family does not implement it (they raise, in four different ways)."""
    try:
        return getattr(model, accessor)(*arguments)
    except (NotImplementedError, AttributeError, TypeError, ValueError):
        return None


def inside(name: str, root: str) -> bool:
    """True for the root itself and all that lies in it; everything lies in ""."""
    return name == root or name.startswith(f"{root}.") or root == ""


def ancestors(name: str) -> list[str]:
    """Proper ancestors, nearest first, without the model itself."""
    found = []
    while "." in name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found


def part_of(roots: Mapping[str, str], name: str) -> str:
    """The part of the longest prefix of `name` that is a root."""
    prefix = name
    while prefix not in roots:
        prefix = prefix.rpartition(".")[0]
    return roots[prefix]


def head_of(model: Any) -> Any:
    """The module that turns states into token scores, by the accessors; None where there is none."""
    found = ask(model, "get_output_embeddings")
    if found is None:
        decoder = ask(model, "get_decoder")
        found = ask(decoder, "get_output_embeddings") if decoder is not model else None
    return found


def find_roots(model: Any, names: Names) -> dict[str, str]:
    """Module-name prefix -> part; "" is always there."""
    inner = _speaker(model, names)
    if inner is not None:
        return _composed(model, names, inner)
    roots = _towers(model, names)
    if ask(model, "get_decoder") in (None, model):
        reads = _MAIN_INPUT.get(getattr(model, "main_input_name", ""))
        if reads and not isinstance(ask(model, "get_input_embeddings"), nn.Embedding):
            return _alone(names, reads)
        if not roots:
            return _alone(names, "language") | _heads(model, names)
    roots.update(_language(model, names, roots))
    roots.update(_bridges(model, names, roots))
    roots.update(_heads(model, names))
    roots.update(_other_heads(model, names, roots))
    roots.setdefault("", "projector" if any(part != "head" for part in roots.values()) else "language")
    roots.update(_cross_attention(names, roots))
    return roots


def _speaker(model: Any, names: Names) -> str | None:
    """The child that is a whole model of text and media with its head, inside one that has no head itself."""
    if ask(model, "get_output_embeddings") is not None:
        return None
    for name in names.children(""):
        module = names.modules[name]
        reads = getattr(module, "input_modalities", ())
        several = not isinstance(reads, str) and "text" in reads and len(reads) > 1
        if several and ask(module, "get_output_embeddings") is not None:
            return name
    return None


def _composed(model: Any, names: Names, inner: str) -> dict[str, str]:
    """Parts of the inner model; its siblings by the config tree (they speak)."""
    child = names.modules[inner]
    found = {f"{inner}.{name}" if name else inner: part for name, part in find_roots(child, Names(child)).items()}
    for name in names.children(""):
        if name != inner:
            found[name] = "audio" if _AUDIO_KEYS.search(name) else "projector"
    return {"": "projector", **found}


def _alone(names: Names, part: str) -> dict[str, str]:
    """A model of one modality: all of it is one part, but for its heads and a projection behind the layers."""
    found = {"": part}
    children = [name for name in names.children("") if _owns(names.modules[name])]
    biggest = max(children, key=lambda name: _weights(names.modules[name]), default=None)
    behind = False
    for name in children:
        if behind and _HEADS.search(name):
            found[name] = "head"
        elif behind and "project" in name:
            found[name] = "projector"
        behind = behind or name == biggest
    return {**found, **_cross_attention(names, found)}


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _towers(model: Any, names: Names) -> dict[str, str]:
    """Encoders of other modalities: the accessors' answers, then sub-models by config and by declared input."""
    asked = [ask(model, accessor) for accessor in ("get_input_embeddings", "get_decoder")]
    anchors = [anchor for module in asked if (anchor := names.of(module))]
    found: dict[str, str] = {}

    def add(name: str | None, part: str) -> None:
        if name is None or any(inside(anchor, name) for anchor in anchors):
            return
        if not any(inside(name, known) for known in found):
            found[name] = part

    for modality, part in (("image", "vision"), ("video", "vision"), ("audio", "audio")):
        add(names.of(ask(model, "get_encoder", modality)), part)
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


def _language(model: Any, names: Names, towers: Mapping[str, str]) -> dict[str, str]:
    """Roots of the language model: the largest modules around decoder, text encoder and token table that hold
    no tower and are not the base model (whose other children are the projector)."""
    base = names.of(getattr(model, "base_model", None))
    found: dict[str, str] = {}
    decoder = ask(model, "get_decoder")
    nested = _nested_language(model, names, towers)
    for module in (
        None if nested else decoder,
        ask(model, "get_encoder"),
        ask(model, "get_input_embeddings"),
        *(names.modules[name] for name in nested),
    ):
        name = names.of(module)
        if name is None or any(inside(name, tower) for tower in towers):
            continue
        top = None
        for step in (name, *ancestors(name)):
            if any(inside(tower, step) for tower in towers) or (step == base and step != name):
                break
            top = step
        if top is None:  # it holds a tower: the decoder itself is the container, an encoder is looked into
            top = name if module is decoder else None
        if top is not None and not any(inside(top, known) for known in found):
            found[top] = "language"
    if not found and decoder is model:
        found[""] = "language"
    return found


def _nested_language(model: Any, names: Names, towers: Mapping[str, str]) -> list[str]:
    """Text models inside a decoder that is only a container: one around the token table and its layers, and those
    beside it that say they read text. Empty where the decoder's layers are its own."""
    decoder, table = names.of(ask(model, "get_decoder")), names.of(ask(model, "get_input_embeddings"))
    if decoder is None or table is None or not any(inside(tower, decoder) for tower in towers):
        return []
    texts = [
        name
        for name, module in names.modules.items()
        if name != decoder
        and inside(name, decoder)
        and getattr(module, "input_modalities", None) in ("text", ("text",), ["text"])
        and not any(inside(name, tower) or inside(tower, name) for tower in towers)
        and any(isinstance(child, nn.ModuleList) for child in module.children())
    ]
    return texts if any(inside(table, text) for text in texts) else []


def _bridges(model: Any, names: Names, roots: Mapping[str, str]) -> dict[str, str]:
    """Projectors that do not lie beside the language model: inside a tower (`visual.merger`) or inside a language
    model that holds its towers itself."""
    towers = [name for name, part in roots.items() if part in ("vision", "audio")]
    languages = [name for name, part in roots.items() if part == "language"]
    found: dict[str, str] = {}
    for language in languages:
        held = [tower for tower in towers if inside(tower, language)]
        for child in names.children(language) if held else ():
            if child not in roots and _BRIDGE.search(child.rpartition(".")[2]):
                found[child] = "projector"
        # What only wraps a tower inside the language model holds the tower and what leads out of it.
        wrappers = {step for tower in held for step in ancestors(tower) if step != language and inside(step, language)}
        found.update(dict.fromkeys(wrappers, "projector"))
        for name in names.modules:  # pixels cut into patches by the language model itself
            foreign = name in roots or any(inside(name, tower) for tower in towers)
            if inside(name, language) and not foreign and _PATCHES.search(name.rpartition(".")[2]):
                found[name] = "projector"
    beside: list[str] = []
    for name, module in names.modules.items():
        apart = not any(inside(name, root) or (root and inside(root, name)) for root in roots if root)
        top = name and apart and not any(inside(name, other) for other in beside)
        if top and not _is_head(names, name, model) and _owns(module):
            beside.append(name)
    if found or any(not _is_gauge(names.modules[name]) for name in beside):
        return found
    for tower in towers:
        found.update(dict.fromkeys(_inner_bridges(model, names, tower), "projector"))
    return found


def _is_gauge(module: nn.Module) -> bool:
    """True for what ends in a single number (a router's score): it is no bridge to the text."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return bool(layers) and layers[-1].out_features == 1


def _inner_bridges(model: Any, names: Names, tower: str) -> list[str]:
    """Children of a tower, beside its layers, that are named as bridges or lead to the language model's width."""
    children = [child for child in names.children(tower) if _owns(names.modules[child])]
    if not children:
        return []
    layers = children.index(max(children, key=lambda child: _weights(names.modules[child])))
    named = [
        child
        for number, child in enumerate(children)
        if _BRIDGE.search(last := child.rpartition(".")[2]) and not ("project" in last and number < layers)
    ]
    if named:
        return named
    table = ask(model, "get_input_embeddings")
    width = getattr(table, "embedding_dim", None)
    ends = [child for child in children if not isinstance(names.modules[child], nn.ModuleList)][-1:]
    return [child for child in ends if width is not None and _leads_to(names.modules[child], width)]


def _leads_to(module: nn.Module, width: int) -> bool:
    """True when the module's linear layers end at `width` and start at another one (a pooler keeps its width)."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return bool(layers) and layers[-1].out_features == width != layers[0].in_features


def _is_head(names: Names, name: str, model: Any) -> bool:
    return any(inside(name, root) for root in _heads(model, names))


def _heads(model: Any, names: Names) -> dict[str, str]:
    """The vocabulary head with what belongs to it alone (a transform before it), never with layers or the table."""
    name = names.of(head_of(model))
    if name is None:
        return {}
    table = names.of(ask(model, "get_input_embeddings"))
    top = name
    for step in ancestors(name):
        holds_layers = any(isinstance(module, nn.ModuleList) for module in names.modules[step].modules())
        if holds_layers or (table and inside(table, step)):
            break
        top = step
    return {top: "head"}


def _other_heads(model: Any, names: Names, roots: Mapping[str, str]) -> dict[str, str]:
    """Heads for something else than tokens (actions, picture codes, time stamps): beside tower and language model,
    by name, since no accessor tells of them."""
    base = names.of(getattr(model, "base_model", None))
    beside = [*names.children(""), *(names.children(base) if base else ())]
    return {
        name: "head"
        for name in beside
        if name not in roots
        and _HEADS.search(name.rpartition(".")[2])
        and _owns(names.modules[name])
        and not any(root and (inside(name, root) or inside(root, name)) for root in roots)
    }


def _cross_attention(names: Names, roots: Mapping[str, str]) -> dict[str, str]:
    """Layers of the language model that attend to something other than the text, and those of a Q-Former that attend
    to the picture: the whole layer where it has no self-attention (mllama), else the attending module alone."""
    found: dict[str, str] = {}
    for name, module in names.modules.items():
        if not name or part_of(roots, name) not in ("language", "projector"):
            continue
        if any(inside(name, known) for known in found) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        children = [(child, inner) for child, inner in module.named_children() if _owns(inner)]
        norms = [child for child, inner in children if "norm" in type(inner).__name__.lower()]
        crossing = [child for child, inner in children if child not in norms and _crosses(child, inner)]
        others = [child for child, _ in children if child not in (*crossing, *norms) and _ATTENTION.search(child)]
        parent = names.modules.get(name.rpartition(".")[0])
        if crossing and not others and isinstance(parent, nn.ModuleList):
            merged = any("Merged" in type(getattr(module, child)).__name__ for child in crossing)
            adapted = any(isinstance(inner, nn.ModuleList) for _, inner in children)
            if not merged and not adapted:
                found[name] = "cross_attention"
                continue
        found.update({f"{name}.{child}": "cross_attention" for child in crossing})
    return found


def _crosses(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return bool(_CROSS.search(name) or _CROSS_KIND.search(type(module).__name__))
