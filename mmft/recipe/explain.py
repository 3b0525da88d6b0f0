"""pydantic's verdicts in the house form: field and value, file and line, what is allowed, what to do."""

from __future__ import annotations

import copy
import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mmft.errors import Problem, choices, nearest
from mmft.recipe.nodes import Node
from mmft.recipe.normal import INDEX, bare, flat, sections
from mmft.recipe.schema import DataSource, Recipe

Loc = tuple[str | int, ...]
_PLACEHOLDERS: dict[str, Any] = {
    "name": "run",
    "model": {"name_or_path": "shipped:"},
    "name_or_path": "shipped:",
    "data": {"train": []},
    "train": [],
    "path": "shipped:",
}
_KINDS = {"bool": "true/false", "int": "a whole number", "float": "a number", "str": "text"}
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def dotted(loc: Loc) -> str:
    """`train.learning_rate`, `data.train.0.path`."""
    return ".".join(str(part).removeprefix(INDEX) for part in loc)


def shown(value: object) -> str:
    """A value for an error's text, at most 80 characters."""
    text = {True: "true", False: "false", None: "nothing"}.get(value) if isinstance(value, bool | None) else repr(value)
    assert text is not None
    return text if len(text) <= 80 else text[:77] + "..."


def describe(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """What a field's type allows, in words: `a number > 0`, `float32, bfloat16, float16`, `a list of ...`."""
    if isinstance(annotation, FieldInfo):
        return describe(annotation.annotation, (*annotation.metadata, *limits))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], (*arguments[1:], *limits))
    if origin in (Union, types.UnionType):
        kept = [describe(entry, limits) for entry in arguments if entry is not type(None)]
        return ", or ".join(kept) + (", or null" if len(kept) < len(arguments) else "")
    if origin is Literal:
        return ", ".join(str(entry) for entry in arguments)
    if origin is tuple:
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return f"a mapping from {describe(arguments[0])} to {_plural(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with the keys " + ", ".join(annotation.model_fields)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(annotation, "")
    found = [
        (op, getattr(entry, name)) for entry in _flatten(limits) for name, op in _LIMITS.items() if _has(entry, name)
    ]
    return words + (" " + " and ".join(f"{op} {bound:g}" for op, bound in found) if found else "")


def _plural(annotation: Any) -> str:
    if bare(annotation) is str:
        return "texts"
    return "data sets" if bare(annotation) is DataSource else describe(annotation)


def _flatten(limits: tuple[Any, ...]) -> list[Any]:
    return [inner for entry in limits for inner in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def _has(entry: object, name: str) -> bool:
    return getattr(entry, name, None) is not None


def _annotation(kind: Any) -> Any:
    return kind.annotation if isinstance(kind, FieldInfo) else kind


def type_at(loc: Loc) -> Any:
    """The annotation (or FieldInfo) at a place of the recipe; None where the schema has none."""
    kind: Any = Recipe
    for part in loc:
        found = bare(_annotation(kind))
        if isinstance(found, type) and issubclass(found, BaseModel):
            kind = found.model_fields.get(str(part))
        elif get_origin(found) is tuple:
            kind = get_args(found)[0]
        elif get_origin(found) is dict:
            kind = get_args(found)[0 if part == "[key]" else 1]
        else:
            return None
        if kind is None:
            return None
    return kind


def problem_of(error: ErrorDetails, root: Node) -> Problem | None:
    """One of pydantic's errors as a Problem; None when its place was reported before."""
    loc = _without_members(tuple(error["loc"]))
    kind = error["type"]
    key_wrong = bool(loc) and loc[-1] == "[key]"
    place = loc[:-1] if key_wrong else loc
    node, depth = root.deepest(place)
    if node.bad:
        return None
    name, where = dotted(place), node.where
    if key_wrong or kind == "extra_forbidden":
        return _unknown(place, where)
    expected = type_at(place)
    allowed = describe(expected) if expected is not None else None
    if kind == "missing" or depth < len(place):
        return Problem(f"{name}: missing", where, allowed, "add it")
    value = node.plain()
    if len(loc) < len(error["loc"]):
        return Problem(f"{name}: {shown(value)} is not allowed", where, allowed, "give what is allowed")
    if kind == "literal_error":
        inner = get_args(bare(_annotation(expected)))
        names = [str(entry) for entry in inner]
        near = nearest(str(value), names) if isinstance(value, str) else None
        do = f"write {near}" if near else "choose one of the allowed words"
        word = _bool_word(node)
        what = f"{name}: {word or shown(value)} is not allowed"
        if word and node.raw in names:
            do = f"put it into quotes: '{node.raw}'"
        return Problem(what, where, choices(names, word=str(value)), do)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return Problem(f"{name}: {shown(value)} is out of range", where, allowed, "choose a value in that range")
    return _wrong_type(name, node, allowed)


def _without_members(loc: Loc) -> Loc:
    """The place without pydantic's names of the members of a union (`train.packing.bool`), and what is behind them."""
    marks = ("literal[", "tuple[", "list[", "dict[")
    for at, part in enumerate(loc):
        if at and isinstance(part, str) and (part in ("bool", "int", "float", "str") or part.startswith(marks)):
            return loc[:at]
    return loc


def _bool_word(node: Node) -> str | None:
    """`no` read as false surprises; say what YAML made of it."""
    if isinstance(node.value, bool) and node.raw and node.raw.lower() not in ("true", "false"):
        return f"the word {node.raw} (YAML reads it as {shown(node.value)})"
    return None


def _wrong_type(name: str, node: Node, allowed: str | None) -> Problem:
    value = node.value
    if value is None:
        return Problem(f"{name}: empty", node.where, allowed, "give a value, or delete the line for the default")
    if isinstance(value, (dict, list)):
        kind = "a mapping" if isinstance(value, dict) else "a list"
        return Problem(f"{name}: {kind} is not allowed here", node.where, allowed, "give what is allowed")
    text_wanted = bool(allowed) and str(allowed).startswith("text")
    if text_wanted:
        word = _bool_word(node) or f"{node.raw or shown(value)} (YAML reads it as {_KINDS[type(value).__name__]})"
        do = f"put it into quotes: '{node.raw}'" if node.raw else "give text"
        return Problem(f"{name}: {word} is not text", node.where, allowed, do)
    do = "give what is allowed"
    if isinstance(value, str):
        do = _unquoted(value, allowed) or do
    elif isinstance(value, float) and value == int(value) and "whole" in str(allowed):
        do = f"write {int(value)}"
    said = f"{shown(value)} ({_KINDS[type(value).__name__]})"
    return Problem(f"{name}: {_bool_word(node) or said} is not allowed here", node.where, allowed, do)


def _unquoted(value: str, allowed: str | None) -> str | None:
    try:
        number = float(value)
    except ValueError:
        return None
    if "number" not in str(allowed) or len(value) > 40:
        return None
    return f"write the number without quotes: {value.strip()}" if number == number else None


def _unknown(loc: Loc, where: str) -> Problem:
    word, parent = str(loc[-1]), loc[:-1]
    kind = type_at(parent) if parent else Recipe
    found = bare(_annotation(kind))
    if isinstance(found, type) and issubclass(found, BaseModel):
        names = list(found.model_fields)
    else:
        names = [str(entry) for entry in get_args(get_args(found)[0])] if get_origin(found) is dict else []
    allowed, do = choices(names, word=word), "correct the spelling or delete the line"
    if nearest(word, names) is None:
        do = _other_place(word, parent) or do
    return Problem(f"{dotted(loc)}: unknown key", where, allowed, do)


def _other_place(word: str, parent: Loc) -> str | None:
    owners = [name for name, kind in sections().items() if word in kind.model_fields and (name,) != parent]
    if owners:
        return "write it as " + " or ".join(f"{owner}.{word}" for owner in owners)
    near = nearest(word, flat()) if not parent else None
    return f"did you mean {near} (it is {'.'.join(flat()[near])})?" if near else None


# ---------------------------------------------------------------- validation


def validate(root: Node) -> tuple[Recipe | None, list[Problem], set[str]]:
    """The recipe of a tree: (recipe, problems, dotted places that are wrong).

    With problems, the recipe is what remains when the wrong places are left out, good for cross-field rules only;
    None when nothing remains.
    """
    data = root.plain()
    problems: list[Problem] = []
    broken: set[str] = set()
    for attempt in range(8):
        try:
            # JSON in strict mode: lists may become tuples and whole numbers floats, and nothing else is bent.
            return Recipe.model_validate_json(json.dumps(data), strict=True), problems, broken
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
        if attempt == 0:
            problems = list(dict.fromkeys(found for entry in errors if (found := problem_of(entry, root)) is not None))
            data = copy.deepcopy(data)
        # Backwards, so that a list's later entries go before its earlier ones.
        for entry in sorted(errors, key=_order, reverse=True):
            loc = _without_members(tuple(part for part in entry["loc"] if part != "[key]"))
            if dotted(loc) in broken and len(loc) < len(entry["loc"]):
                continue  # another member of the same union
            broken.add(_broken_place(entry["type"], loc))
            _repair(data, loc, missing=entry["type"] == "missing")
    return None, problems, broken


def _broken_place(kind: str, loc: Loc) -> str:
    if kind == "extra_forbidden":
        # The field that was probably meant is not known, and rules should not speak about its default.
        found = bare(_annotation(type_at(loc[:-1]))) if loc[:-1] else Recipe
        return dotted((*loc[:-1], nearest(str(loc[-1]), getattr(found, "model_fields", ())) or str(loc[-1])))
    return dotted(loc[:-1] if isinstance(loc[-1], int) else loc)


def _order(entry: ErrorDetails) -> list[tuple[int, str]]:
    return [(part, "") if isinstance(part, int) else (-1, part) for part in entry["loc"]]


def _repair(data: Any, loc: Loc, *, missing: bool) -> None:
    for part in loc[:-1]:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return
    last = loc[-1]
    if missing and isinstance(data, dict):
        data[str(last)] = copy.deepcopy(_PLACEHOLDERS.get(str(last)))
    elif isinstance(data, dict):
        data.pop(last, None)
    elif isinstance(data, list) and isinstance(last, int) and last < len(data):
        data.pop(last)
