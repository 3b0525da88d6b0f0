"""The parts of any model, found by structure: no table of model families.

Sources, in this order: transformers' accessors (`get_encoder(modality)`, `get_decoder`, `get_input_embeddings`,
`get_output_embeddings`), the config tree and the declared input modalities of the sub-models, and names only where
the first two say nothing; a forward pass that shows what depends on the media input where all are silent and an example
of the inputs is given (`flow`). What lies beside the towers and the language model is the projector.

Every module and parameter belongs to exactly one part and one sub-part; a name belongs where its longest known
prefix belongs. Tied weights are counted once, with the token embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from mmft.backbones.flow import flow_roots
from mmft.backbones.roots import Names, ancestors, ask, find_roots, head_of, part_of
from mmft.recipe.check import PARTS, SUBPARTS

__all__ = ["PARTS", "SUBPARTS", "Parts", "count", "find_parts", "is_linear", "owners", "size"]

_ATTENTION = re.compile(r"(^|_)(attn|attention|crossattention)|attn$|attention$", re.IGNORECASE)
# Sparse attention's choice of tokens is a hard top-k: no gradient comes through it, so an adapter there never trains.
_INDEXER = re.compile(r"index(er)?(_|$)", re.IGNORECASE)
_MLP = re.compile(
    r"(^|_)(mlp|mlps|ffn|feed_forward|feedforward|moe|experts?|intermediate|fc\d?)(_|\d|$)", re.IGNORECASE
)
_EMBED = re.compile(r"embed|(^|_)wte$|(^|_)wpe$", re.IGNORECASE)


@dataclass(frozen=True)
class Parts:
    """Where the names of one model belong.

    `roots` maps module-name prefixes to parts ("" is the model itself), `subs` module names to sub-parts,
    `linear` the names of layers that an adapter can sit on to (part, sub-part), `experts` the names of parameters
    that hold a stack of expert matrices (three dimensions), which no adapter here can sit on. `names` are the parts
    that own at least one parameter, in the order of `PARTS`; `tied_head`: the head's weight is the token table;
    `attending`: the numbered modules (`layers.3`) around attention.
    """

    roots: Mapping[str, str] = field(repr=False)
    subs: Mapping[str, str] = field(repr=False)
    linear: Mapping[str, tuple[str, str]] = field(repr=False)
    experts: Mapping[str, tuple[str, str]] = field(repr=False)
    tied_head: bool
    names: tuple[str, ...] = ()
    attending: frozenset[str] = field(default=frozenset(), repr=False)

    def part_of(self, name: str) -> str:
        """The part of a module or parameter name, as in `model.named_modules()` / `named_parameters()`."""
        return part_of(self.roots, name)

    def subpart_of(self, name: str) -> str:
        """The sub-part of a module or parameter name; a parameter belongs with the module that owns it."""
        prefix = name
        while prefix and prefix not in self.subs:
            prefix = prefix.rpartition(".")[0]
        return self.subs.get(prefix, "other")

    def linears(self, part: str, sub: str | None = None) -> list[str]:
        """Names of the layers of `part` (and `sub`) that LoRA can sit on, in the model's order."""
        return [name for name, home in self.linear.items() if home[0] == part and sub in (None, home[1])]


def find_parts(model: Any, *, inputs: Mapping[str, Any] | None = None) -> Parts:
    """Parts of a `PreTrainedModel` (on any device, quantized or not, without adapters). Milliseconds.

    With an example of the model's inputs (and real weights), a model whose structure tells of no tower is run to see
    which modules read media (`backbones.flow`: three forward passes).
    """
    names = Names(model)
    roots = find_roots(model, names)
    if inputs is not None and not {"vision", "audio"} & set(roots.values()):
        roots |= flow_roots(model, names, inputs)
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
    known = tuple(part for part in PARTS if part in present)
    return Parts(roots, subs, linear, experts, _is_tied(model), known, _attending(subs))


def _attending(subs: Mapping[str, str]) -> frozenset[str]:
    """Numbered modules, not inside attention themselves, that hold attention."""
    return frozenset(
        step
        for name, sub in subs.items()
        if sub == "attention"
        for step in ancestors(name)
        if step.rpartition(".")[2].isdigit() and subs[step] != "attention"
    )


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


def _is_tied(model: Any) -> bool:
    head, table = head_of(model), ask(model, "get_input_embeddings")
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(table, "weight", None)


def _subpart(name: str, names: Names) -> str:
    """norm where the module is one; else what the outermost telling module on its path is."""
    module = names.modules[name]
    if name and "norm" in type(module).__name__.lower():
        return "norm"
    for step in (*reversed(ancestors(name)), name):
        here = names.modules[step]
        last = step.rpartition(".")[2]
        kind = type(here).__name__
        if isinstance(here, (nn.ModuleList, nn.ModuleDict)) or step == "":
            continue
        if isinstance(here, nn.Embedding) or (_EMBED.search(last) and not hasattr(here, "input_modalities")):
            return "embedding"
        if _ATTENTION.search(last) or kind.endswith("Attention"):
            return "other" if any(_INDEXER.match(part) for part in name.split(".")) else "attention"
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
