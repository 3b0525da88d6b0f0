"""One layer of a recipe (a file, an override) in mmft's own spelling: sections, field names, value words, lists."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from mmft.errors import Problem, choices
from mmft.recipe import aliases
from mmft.recipe.nodes import Node
from mmft.recipe.schema import DataSource, PartAdapter, Recipe

INDEX = "#"  # `#3` as a key stands for list entry 3 of an override such as `data.train.3.path=x`


def bare(annotation: Any) -> Any:
    """An annotation without `Annotated` and without `| None`."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [entry for entry in get_args(annotation) if entry is not type(None)]
        return bare(kept[0]) if len(kept) == 1 else annotation
    return annotation


@cache
def sections() -> Mapping[str, type[BaseModel]]:
    """The recipe's sections by name."""
    found = {name: bare(field.annotation) for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


@cache
def flat() -> Mapping[str, tuple[str, str]]:
    """What a key means at the top level: fields and spellings that only one section has, as (section, field)."""
    owners: dict[str, set[tuple[str, str]]] = {}
    for section, kind in sections().items():
        names = {name: name for name in kind.model_fields} | aliases.KEYS.get(section, {})
        for spelled, name in names.items():
            owners.setdefault(spelled, set()).add((section, name))
    taken = {*Recipe.model_fields, *aliases.SECTIONS}
    unique = {key: next(iter(found)) for key, found in owners.items() if len(found) == 1 and key not in taken}
    return {**unique, "dtype": ("model", "dtype")}


class _Layer:
    def __init__(self, root: Node, problems: list[Problem]) -> None:
        self.root = root
        self.problems = problems
        self.top: dict[str, Node] = {}
        self.fields: dict[str, dict[str, Node]] = {}
        self.places: dict[str, Node] = {}
        self.spelled: dict[str, tuple[str, str]] = {}

    def run(self) -> Node:
        assert isinstance(self.root.value, dict)
        for key, node in self.root.value.items():
            self.entry(key, node)
        for section, fields in self.fields.items():
            self.top[section] = self.places[section].with_value(fields)
        return self.root.with_value(self.top)

    def entry(self, key: str, node: Node) -> None:
        name = key.replace("-", "_")
        if name in sections():
            self.section(name, node)
        elif name in aliases.SECTIONS and isinstance(node.value, dict):
            self.section(aliases.SECTIONS[name], node)
        elif name in Recipe.model_fields or name == "extends":
            self.top[name] = node
        elif name in flat() or name in aliases.OWN:
            section, field = flat().get(name, ("train", name))
            self.put(section, field, node, spelled=key)
        elif name in aliases.REFUSED:
            self.refuse(key, name, node)
        else:
            self.top[key] = node

    def section(self, section: str, node: Node) -> None:
        if node.bad or isinstance(node.value, list) and section != "data":
            self.top[section] = node
            return
        if section == "quantization" and not isinstance(node.value, dict):
            if node.value not in (None, "none", False):
                self.put("train", "quantization_bit", node, spelled="quantization")
            return
        if not isinstance(node.value, dict) and node.value is not None:
            if section in aliases.WHOLE:
                self.put(section, aliases.WHOLE[section], node, spelled=section)
            else:
                self.top[section] = node
            return
        self.open(section, node)
        known = sections()[section].model_fields
        spellings = {**aliases.KEYS.get(section, {}), **aliases.OWN_ONLY.get(section, {})}
        for key, child in node.value.items() if isinstance(node.value, dict) else ():
            name = key.replace("-", "_")
            if name in known:
                self.put(section, name, child, spelled=f"{section}.{key}")
            elif name in spellings:
                self.put(section, spellings[name], child, spelled=f"{section}.{key}")
            elif (section, name) in aliases.ELSEWHERE:
                other, _, field = aliases.ELSEWHERE[section, name].partition(".")
                self.put(other, field, child, spelled=f"{section}.{key}")
            elif name in aliases.OWN:
                self.put(section, name, child, spelled=f"{section}.{key}")
            elif name in aliases.REFUSED:
                self.refuse(f"{section}.{key}", name, child)
            else:
                self.fields[section][key] = child

    def open(self, section: str, node: Node) -> None:
        self.places.setdefault(section, node)
        self.fields.setdefault(section, {})

    def refuse(self, spelled: str, name: str, node: Node) -> None:
        self.problems.append(Problem(f"{spelled}: not a key of mmft", node.where, None, aliases.REFUSED[name]))

    def put(self, section: str, field: str, node: Node, *, spelled: str) -> None:
        """Set `section.field`, once."""
        if field in ("quantization_bit", "quant_bits"):
            self.bits(node, spelled)
            return
        if field in ("optim", "optimizer"):
            self.optimizer(node, spelled)
            return
        if field == "freeze_trainable_layers":
            self.freeze(node, spelled)
            return
        if field == "pissa_init":
            if node.value is not False:
                self.put("adapter", "init_lora_weights", node.with_value("pissa"), spelled=spelled)
            return
        dotted = f"{section}.{field}"
        more = aliases.MEANS.get(dotted, {}).get(node.value) if isinstance(node.value, str) else None
        if more is not None:
            owner, _, name = more[0].partition(".")
            self.put(owner, name, node.with_value(more[1]), spelled=f"{spelled}: {node.value}")
            node = node.with_value("lora")
        self.open(section, node)
        if field in self.fields[section]:
            first, where = self.spelled[dotted]
            what = f"{dotted}: given twice, as `{first}` ({where}) and as `{spelled}`"
            self.problems.append(Problem(what, node.where, None, "keep one of the two"))
            return
        self.spelled[dotted] = (spelled, node.where)
        self.fields[section][field] = _value(section, field, node)

    def bits(self, node: Node, spelled: str) -> None:
        word = str(node.value).lower().removesuffix("bit").removeprefix("int").removesuffix("-")
        field = {"4": "load_in_4bit", "nf4": "load_in_4bit", "8": "load_in_8bit"}.get(word)
        if field is not None:
            self.put("quantization", field, node.with_value(True), spelled=spelled)
        elif node.value is not None:
            do = "write 4 or 8, or delete the line"
            self.problems.append(Problem(f"{spelled}: {node.value!r} is not allowed", node.where, "4, 8", do))

    def freeze(self, node: Node, spelled: str) -> None:
        """LLaMA-Factory's number of layers that are trained: the last ones, or with a minus the first ones."""
        number = node.value
        if not isinstance(number, int) or isinstance(number, bool) or number == 0:
            do = "write adapter.layers: last:2, or delete the line for all layers"
            what = f"{spelled}: {str(number)[:80]} is not allowed"
            self.problems.append(Problem(what, node.where, "a whole number, not 0", do))
            return
        words = f"last:{number}" if number > 0 else f"first:{-number}"
        self.put("adapter", "layers", node.with_value(words), spelled=spelled)

    def optimizer(self, node: Node, spelled: str) -> None:
        if node.value not in aliases.ADAMW:
            allowed = choices(aliases.ADAMW, word=str(node.value))
            what = f"{spelled}: {str(node.value)[:80]!r} is not allowed"
            self.problems.append(Problem(what, node.where, allowed, "delete the line; AdamW is used"))


def _value(section: str, field: str, node: Node) -> Node:
    """`node` in the field's own words and shape."""
    words = aliases.WORDS.get(f"{section}.{field}", {})
    if isinstance(node.value, str) and node.value in words:
        return node.with_value(words[node.value])
    if field == "report_to" and node.value in (None, "none", "None"):
        return node.with_value([])
    if field == "targets":
        return _targets(node)
    if field == "init_lora_weights" and node.value is True:
        return node.with_value("default")
    if field == "layers":
        return _layers(node)
    if field in ("exclude", "modules_to_save") and isinstance(node.value, str):
        return _words(node)
    kind = bare(sections()[section].model_fields[field].annotation)
    inner = bare(get_args(kind)[0]) if get_origin(kind) is tuple else None
    if inner is DataSource:
        return _sources(node)
    if field == "parts" and isinstance(node.value, dict):
        return node.with_value({part: _part(child) for part, child in node.value.items()})
    return _listed(node) if inner is not None else node


def _listed(node: Node) -> Node:
    single = not isinstance(node.value, (list, dict)) and node.value is not None
    return node.with_value([replace(node)]) if single and not node.bad else node


def _layers(node: Node) -> Node:
    """Layer numbers (peft's `layers_to_transform`) as the text `0,3`."""
    numbers = node.value if isinstance(node.value, list) else [node]
    values = [entry.value for entry in numbers]
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return node.with_value(",".join(str(value) for value in values))
    return node


def _words(node: Node) -> Node:
    words = [word.strip() for word in str(node.value).split(",") if word.strip()]
    return node.with_value([Node(word, node.where) for word in words])


def _targets(node: Node) -> Node:
    if isinstance(node.value, str):
        node = _words(node)
    if isinstance(node.value, list):
        everything = ("all", "all_linear", "all-linear")
        return node.with_value([n.with_value("all-linear") if n.value in everything else n for n in node.value])
    return node


def _sources(node: Node) -> Node:
    if isinstance(node.value, dict) and any(key.startswith(INDEX) for key in node.value):
        return node.with_value({key: _source(child) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return node.with_value([_source(child) for child in node.value])
    return node if node.value is None or node.bad else node.with_value([_source(node)])


def _source(node: Node) -> Node:
    if isinstance(node.value, str):
        return node.with_value({"path": node})
    return _renamed(node, aliases.SOURCE, DataSource)


def _part(node: Node) -> Node:
    if isinstance(node.value, str):
        return node.with_value({"mode": _mode(node)})
    renamed = _renamed(node, aliases.PART, PartAdapter)
    if isinstance(renamed.value, dict) and "mode" in renamed.value:
        return renamed.with_value({**renamed.value, "mode": _mode(renamed.value["mode"])})
    return renamed


def _mode(node: Node) -> Node:
    word = aliases.PART_MODES.get(node.value) if isinstance(node.value, str) else None
    return node if word is None else node.with_value(word)


def _renamed(node: Node, spellings: dict[str, str], kind: type[BaseModel]) -> Node:
    if not isinstance(node.value, dict):
        return node
    fields: dict[str, Node] = {}
    for key, child in node.value.items():
        name = spellings.get(key, key) if key not in kind.model_fields else key
        # Given twice: the other spelling stays as it is and is reported as an unknown key.
        fields[key if name in fields or (name != key and name in node.value) else name] = child
    return node.with_value(fields)


def normalise(root: Node, problems: list[Problem]) -> Node:
    """The layer `root` (a mapping) in mmft's own spelling; what cannot be is appended to `problems`."""
    return _Layer(root, problems).run()
