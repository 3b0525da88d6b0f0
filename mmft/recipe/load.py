"""From a file (or a mapping) and `key=value` overrides to a checked `Recipe`, or to one error with all problems.

Order: `extends:` parents first, the file over them, overrides last. Each layer is brought to mmft's own spelling before
it is merged: mappings merge key by key, lists replace.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmft.errors import Problem, RecipeError, nearest
from mmft.recipe.check import check
from mmft.recipe.digest import dump_recipe, recipe_digest, recipe_drift
from mmft.recipe.explain import dotted, validate
from mmft.recipe.nodes import MAX_BYTES, Node, from_python, parse, strange_values
from mmft.recipe.normal import INDEX, normalise
from mmft.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "dump_recipe", "load_recipe", "load_with_places", "recipe_digest", "recipe_drift"]

MAX_PARENTS = 10
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe and where each of its given values stands (`train.learning_rate` -> "file:line")."""

    recipe: Recipe
    places: Mapping[str, str]


def load_recipe(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file or mapping, overrides applied, checked.

    Relative data, media and model paths that exist beside the file they are written in become absolute.
    Raises RecipeError with one problem for each thing that is wrong. Price: about 10 ms, no torch.
    """
    return load_with_places(path, overrides).recipe


def load_with_places(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """`load_recipe`, keeping the lines."""
    problems: list[Problem] = []
    root = _layers(path, problems)
    if root is None:
        raise RecipeError(problems)
    for override in overrides:
        layer = _override(override, problems)
        if layer is not None:
            root = _merge(root, normalise(layer, problems), problems, ())
    root = strange_values(_absolute(_defaults(root, path), ()), problems)
    recipe, found, broken = validate(root)
    problems += found
    if recipe is not None:
        problems += check(recipe, root, broken)
    if problems or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(problems), key=_by_place))
    return LoadedRecipe(recipe, _places(root, ()))


def _by_place(problem: Problem) -> tuple[bool, str, int]:
    match = re.fullmatch(r"(.*):(\d+)", problem.where or "", re.DOTALL)
    override = (problem.where or "").startswith("command line")
    return (override, match[1], int(match[2])) if match and not override else (override, problem.where or "", 0)


def _places(node: Node, path: tuple[str | int, ...]) -> dict[str, str]:
    found = {dotted(path): node.where} if path else {}
    children = node.value.items() if isinstance(node.value, dict) else ()
    entries = enumerate(node.value) if isinstance(node.value, list) else ()
    for key, child in (*children, *entries):
        found |= _places(child, (*path, key))
    return found


# ---------------------------------------------------------------- files and `extends`


def _layers(path: str | Path | Mapping[str, Any], problems: list[Problem]) -> Node | None:
    if isinstance(path, Mapping):
        root: Node | None = from_python(path, problems)
        return None if root is None else _extended(root, Path.cwd(), [], problems)
    return _file(Path(path), [], problems)


def _file(path: Path, above: list[Path], problems: list[Problem], *, where: str | None = None) -> Node | None:
    text = _read(path, problems, where=where)
    if text is None:
        return None
    before = len(problems)
    root = parse(text, str(path), problems, folder=path.absolute().parent)
    if root is None or not isinstance(root.value, dict):
        if len(problems) == before:
            what = "the recipe is empty" if root is None or root.value is None else "the recipe is not a mapping"
            problems.append(Problem(what, str(path), "key: value lines", "start with model: and data:"))
        return None
    return _extended(root, path.parent, [*above, path.resolve()], problems)


def _extended(root: Node, folder: Path, chain: list[Path], problems: list[Problem]) -> Node | None:
    layer = normalise(root, problems)
    assert isinstance(layer.value, dict)
    parent = layer.value.pop("extends", None)
    if parent is None:
        return layer
    allowed = f"a file name that ends in {', '.join(SUFFIXES)}"
    if not isinstance(parent.value, str) or not parent.value.endswith(SUFFIXES):
        what = f"extends: {parent.plain()!r} is not a recipe file"
        problems.append(Problem(what[:160], parent.where, allowed, "give the path of one recipe"))
        return layer
    target = folder / parent.value
    resolved = target.resolve()
    if resolved in chain or len(chain) > MAX_PARENTS:
        names = " -> ".join(entry.name for entry in (*chain, resolved))
        what = f"extends: circle: {names}" if resolved in chain else f"extends: more than {MAX_PARENTS} files deep"
        problems.append(Problem(what, parent.where, None, "take one of the extends lines out"))
        return layer
    base = _file(target, chain, problems, where=parent.where)
    return layer if base is None else _merge(base, layer, problems, ())


def _read(path: Path, problems: list[Problem], *, where: str | None) -> str | None:
    place = where or str(path)
    try:
        if not path.is_file():
            names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
            near = nearest(path.name, [name for name in names if name.endswith(SUFFIXES)])
            what = f"recipe file {path} " + ("is not a file" if path.exists() else "does not exist")
            do = "check the path" + (f" (nearest: '{near}')" if near else "")
            problems.append(Problem(what, place, "a YAML file", do))
            return None
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            problems.append(
                Problem(f"the recipe is larger than {MAX_BYTES:,} bytes", place, None, "keep data in data files")
            )
            return None
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.append(Problem("the recipe is not UTF-8 text", f"{path}:{line}", None, "save it as UTF-8"))
    except (OSError, ValueError) as error:
        problems.append(Problem(f"the recipe cannot be read: {error}", place, None, "check the path and its rights"))
    return None


# ---------------------------------------------------------------- overrides and merging


def _override(text: str, problems: list[Problem]) -> Node | None:
    """`a.b.0.c=value` as a layer."""
    where = f"command line: {text}"
    form = "section.key=value, list entries by number (data.train.0.path=x)"
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.strip().split(".")]
    if not equals or not all(parts):
        what = f"override {text[:80]!r} is not of the form key=value"
        problems.append(Problem(what, where, form, "write for example train.learning_rate=1e-4"))
        return None
    if parts[0] == "extends":
        what = "extends: cannot be set on the command line"
        problems.append(Problem(what, where, None, "write it into the recipe file"))
        return None
    before = len(problems)
    node = parse(value, where, problems, folder=Path.cwd(), numbered=False)
    if node is None:
        if len(problems) > before:
            return None
        node = Node(None, where, Path.cwd())
    for part in reversed(parts):
        node = Node(None, where, Path.cwd()).with_value({INDEX + part if part.isdecimal() else part: node})
    return node


def _merge(base: Node, over: Node, problems: list[Problem], path: tuple[str | int, ...]) -> Node:
    """`over` laid upon `base`."""
    if not isinstance(over.value, dict) or over.bad:
        return over
    if any(key.startswith(INDEX) for key in over.value):
        return _merge_entries(base, over.value, problems, path)
    old = base.value if isinstance(base.value, dict) and not base.bad else {}
    empty = Node(None, over.where)
    laid = {key: _merge(old.get(key, empty), child, problems, (*path, key)) for key, child in over.value.items()}
    return (base if old else over).with_value({**old, **laid})


def _merge_entries(base: Node, over: dict[str, Node], problems: list[Problem], path: tuple[str | int, ...]) -> Node:
    entries = list(base.value) if isinstance(base.value, list) else []
    for key, child in over.items():
        index = int(key.removeprefix(INDEX)) if key.removeprefix(INDEX).isdecimal() else -1
        if not 0 <= index <= len(entries) or not isinstance(base.value, (list, type(None))):
            has = f"its length is {len(entries)}" if isinstance(base.value, list) else "it is not a list"
            what = f"{dotted((*path, key))}: no such list entry ({has})"
            allowed = f"0 to {len(entries)} ({len(entries)} appends)" if isinstance(base.value, list) else None
            problems.append(Problem(what, child.where, allowed, "correct the number"))
            continue
        old = entries[index] if index < len(entries) else Node(None, child.where)
        entries[index : index + 1] = [_merge(old, child, problems, (*path, index))]
    return base.with_value(entries)


# ---------------------------------------------------------------- values that follow from others


def _defaults(root: Node, path: str | Path | Mapping[str, Any]) -> Node:
    """The name from the file's stem, and no merged model among those to compare where none is written."""
    assert isinstance(root.value, dict)
    top = dict(root.value)
    if "name" not in top:
        stem = "run" if isinstance(path, Mapping) else Path(path).stem
        top["name"] = Node(re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip(".-") or "run", root.where)
    merge = root.deepest(("export", "merge"))[0]
    evaluate = top.get("evaluate", Node(None, root.where).with_value({}))
    if merge.value is False and isinstance(evaluate.value, dict) and "models" not in evaluate.value:
        models = Node(None, merge.where).with_value([Node(name, merge.where) for name in ("base", "adapter")])
        top["evaluate"] = evaluate.with_value({**evaluate.value, "models": models})
    return root.with_value(top)


_PATHS = re.compile(r"model\.name_or_path|data\.(train|eval)\.\d+\.(path|media_root)|train\.output_dir")


def _there(path: Path) -> bool:
    """Whether a path, or something that a pattern (`shards/*.tar`) stands for, exists."""
    return path.exists() or ("*" in str(path) and next(glob.iglob(str(path), recursive=True), None) is not None)


def _absolute(node: Node, path: tuple[str | int, ...]) -> Node:
    """Paths made absolute where they exist, beside the file they are written in or below the working folder."""
    value = node.value
    if isinstance(value, dict):
        return node.with_value({key: _absolute(child, (*path, key)) for key, child in value.items()})
    if isinstance(value, list):
        return node.with_value([_absolute(child, (*path, index)) for index, child in enumerate(value)])
    if not isinstance(value, str) or not value or "\0" in value or not _PATHS.fullmatch(dotted(path)):
        return node
    file, mark, rows = value.rpartition("#") if path[-1] == "path" else ("", "", "")
    value, tail = (file, mark + rows) if file and rows.isdecimal() else (value, "")  # rows.jsonl#1000
    try:
        given = Path(value).expanduser()
        if path[-1] == "output_dir" or given.is_absolute():
            return replace(node, value=str(given) + tail) if value.startswith("~") else node
        for folder in (node.folder, Path.cwd()):
            if folder is not None and _there(folder / given):
                return replace(node, value=str((folder / given).absolute()) + tail)
    except (OSError, RuntimeError, ValueError):
        return node
    return node
