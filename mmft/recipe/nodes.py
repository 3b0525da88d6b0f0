"""YAML as a tree of nodes that know their file and line; data only, of bounded size and depth.

The tree is built from the parser's events, so no constructor of the yaml package ever runs. Plain words follow
YAML 1.1 with three repairs: `1e-4` is a number, `010` and `12:30` are texts, dates are texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mmft.errors import Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 10_000
Scalar = str | int | float | bool | None

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {form for word in ("true", "yes", "on") for form in (word, word.title(), word.upper())}
_FALSE = {form for word in ("false", "no", "off") for form in (word, word.title(), word.upper())}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,16}")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]{0,30}\.[0-9_]{0,30}|\.[0-9][0-9_]{0,30}|[0-9][0-9_]{0,30}(?=[eE]))(?:[eE][-+]?[0-9]{1,4})?"
)
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the recipe: a scalar, a dict of nodes or a list of nodes.

    `where` is "file:line" (of the key, where there is one) or the override; `folder` what relative paths start from;
    `raw` the plain word that was read as something else than text; a `bad` node was reported already.
    """

    value: Scalar | dict[str, Node] | list[Node]
    where: str
    folder: Path | None = None
    raw: str | None = None
    bad: bool = False
    size: int = field(default=1)

    def plain(self) -> Any:
        """The value without its origins; None for a bad node."""
        if self.bad:
            return None
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def child(self, key: str | int) -> Node | None:
        """The node below `key`, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and str(key).isdecimal() and int(key) < len(self.value):
            return self.value[int(key)]
        return None

    def deepest(self, path: tuple[str | int, ...]) -> tuple[Node, int]:
        """The last node that exists along `path`, and how many keys lead to it."""
        node = self
        for depth, key in enumerate(path):
            below = None if node.bad else node.child(key)
            if below is None:
                return node, depth
            node = below
        return node, len(path)

    def with_value(self, value: Scalar | dict[str, Node] | list[Node]) -> Node:
        """The same place with another value."""
        return replace(self, value=value, raw=None, size=1 + sum(child.size for child in _children(value)))


def _children(value: object) -> list[Node]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def resolve_plain(text: str) -> Scalar:
    """What a plain (unquoted) YAML word means."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if special := _SPECIAL.fullmatch(text):
        return float(special[1] + special[2].lower())
    return text


class _Stop(Exception):
    """The rest of the text is not looked at; the reason is among the problems."""


class _Builder:
    def __init__(self, text: str, label: str, *, folder: Path | None, numbered: bool, problems: list[Problem]) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self.label = label
        self.folder = folder
        self.numbered = numbered
        self.problems = problems
        self.anchors: dict[str, Node | None] = {}
        self.seen = 0

    def where(self, mark: Any) -> str:
        return f"{self.label}:{mark.line + 1}" if self.numbered and mark is not None else self.label

    def stop(self, what: str, mark: Any, *, allowed: str | None = None, do: str | None = None) -> _Stop:
        self.problems.append(Problem(what, self.where(mark), allowed, do))
        return _Stop()

    def document(self) -> Node | None:
        try:
            root = None
            for event in self.events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        do = "put each recipe into a file of its own"
                        raise self.stop("the file holds more than one YAML document", event.start_mark, do=do)
                    root = self.node(next(self.events), 0)
            return root
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            if "nesting depth" in str(error.problem):  # the parser's own limit, of newer PyYAML, is larger than ours
                what = f"nested deeper than {MAX_DEPTH} levels"
                self.problems.append(Problem(what, self.where(mark), None, "write the recipe flat"))
                return None
            self.problems.append(Problem(f"not valid YAML: {error.problem}", self.where(mark), None, _yaml_hint(error)))
        except yaml.YAMLError as error:
            text = re.sub(r"\s+", " ", str(error))[:200]
            self.problems.append(Problem(f"not valid YAML: {text}", self.label, None, "write plain UTF-8 text"))
        except _Stop:
            pass
        return None

    def node(self, event: Any, depth: int) -> Node:
        mark = event.start_mark
        self.seen += 1
        if depth > MAX_DEPTH:
            raise self.stop(f"nested deeper than {MAX_DEPTH} levels", mark, do="write the recipe flat")
        self.limit(self.seen, mark)
        if isinstance(event, yaml.AliasEvent):
            target = self.anchors.get(str(event.anchor))
            if target is None:
                what = f"alias *{event.anchor} stands inside its own anchor or before it"
                raise self.stop(what, mark, do="write the value out")
            return target
        tag = str(event.tag) if event.tag not in (None, "!") else ""
        if event.anchor:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, tag)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            node = self.make(items, mark)
        else:
            node = self.mapping(mark, depth)
        self.limit(node.size, mark)
        if tag and tag not in {_PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq")}:
            shown = "!!" + tag.removeprefix(_PREFIX) if tag.startswith(_PREFIX) else tag
            what, do = f"tag {shown[:80]} is refused: a recipe is data only", "delete the tag"
            self.problems.append(Problem(what, self.where(mark), None, do))
            node = replace(node, bad=True)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def limit(self, nodes: int, mark: Any) -> None:
        if nodes > MAX_NODES:
            what = f"more than {MAX_NODES:,} values, aliases written out"
            raise self.stop(what, mark, do="a recipe is small; put rows into a data file")

    def make(self, value: Scalar | dict[str, Node] | list[Node], mark: Any, raw: str | None = None) -> Node:
        node = Node(value, self.where(mark), self.folder, raw)
        return node if raw is not None else node.with_value(value)

    def scalar(self, event: Any, tag: str) -> Node:
        plain = event.implicit[0] or (tag and tag != _PREFIX + "str")
        value = resolve_plain(event.value) if plain else event.value
        return self.make(value, event.start_mark, None if isinstance(value, str) else event.value)

    def mapping(self, mark: Any, depth: int) -> Node:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                what = "a list, a mapping or an alias stands where a key belongs"
                raise self.stop(
                    what, event.start_mark, allowed="key: value", do="put text that starts with [ or { into quotes"
                )
            self.limit(self.seen + 1, event.start_mark)
            key, where = event.value, self.where(event.start_mark)
            value = self.node(next(self.events), depth + 1)
            if key == "<<" and event.implicit[0]:
                for source in value.value if isinstance(value.value, list) else [value]:
                    if isinstance(source.value, dict):
                        merged = {**source.value, **merged}
                continue
            if key in own:
                what = f"key {key[:80]!r} is given twice in one mapping (first at {own[key].where})"
                self.problems.append(Problem(what, where, None, "keep one of the two"))
            own[key] = replace(value, where=where)
        return self.make({**merged, **own}, mark)


def _yaml_hint(error: yaml.MarkedYAMLError) -> str:
    text = str(error.problem)
    if "\\t" in repr(text) or "tab" in text:
        return "indent with blanks, not with tabs"
    return "check indentation, quotes and brackets near this line"


def parse(
    text: str, label: str, problems: list[Problem], *, folder: Path | None = None, numbered: bool = True
) -> Node | None:
    """The tree of a YAML text, or None when it cannot be read at all; what is wrong is appended to `problems`."""
    return _Builder(text, label, folder=folder, numbered=numbered, problems=problems).document()


def from_python(obj: object, problems: list[Problem], *, path: tuple[str, ...] = ()) -> Node:
    """The tree of a Python mapping with plain values (paths and tuples are taken too)."""
    where = "mapping: " + (".".join(path) or "top level")
    if isinstance(obj, Path):
        obj = str(obj)
    if len(path) > MAX_DEPTH:
        problems.append(Problem(f"nested deeper than {MAX_DEPTH} levels", where, None, "write the recipe flat"))
        return Node(None, where, bad=True)
    if isinstance(obj, Mapping):
        entries = {str(key): from_python(value, problems, path=(*path, str(key))) for key, value in obj.items()}
        return Node(None, where).with_value(entries)
    if isinstance(obj, (list, tuple)):
        items = [from_python(value, problems, path=(*path, str(index))) for index, value in enumerate(obj)]
        return Node(None, where).with_value(items)
    if obj is None or isinstance(obj, (str, bool, int, float)):
        return Node(obj, where)
    what = f"{'.'.join(path)}: a value of type {type(obj).__name__} has no place in a recipe"
    problems.append(Problem(what, where, "text, numbers, true/false, null, lists and mappings", "give a plain value"))
    return Node(None, where, bad=True)


def strange_values(root: Node, problems: list[Problem], *, path: tuple[str, ...] = ()) -> Node:
    """Report numbers that are not finite and texts that are not Unicode, and mark their nodes as bad."""
    value = root.value
    if isinstance(value, dict):
        return root.with_value({key: strange_values(n, problems, path=(*path, key)) for key, n in value.items()})
    if isinstance(value, list):
        return root.with_value([strange_values(n, problems, path=(*path, str(i))) for i, n in enumerate(value)])
    name = ".".join(path)
    if isinstance(value, float) and not math.isfinite(value):
        what = f"{name}: {root.raw or value} is not finite"
        problems.append(Problem(what, root.where, "a finite number", "write the number out"))
        return replace(root, bad=True)
    if isinstance(value, str) and any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
        what = f"{name}: {value[:60]!r} holds NUL or half a surrogate pair"
        problems.append(Problem(what, root.where, "Unicode text", "delete that character"))
        return replace(root, bad=True)
    return root
