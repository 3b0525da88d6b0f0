"""Objectives, rewards and what fetches shards, of the user's own, from a Python file: named on the command line or in
Python, never in a recipe.

The command line is trusted, a recipe is not; what a recipe says can therefore never run code.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmft.data.collate import Batch
from mmft.data.stream_files import Fetch
from mmft.errors import RecipeError, choices
from mmft.files import sha256_bytes
from mmft.objectives.base import Loss, Objective, StepObjective
from mmft.recipe.schema import Recipe

ObjectiveFactory = Callable[[nn.Module, Recipe], Objective]
"""Called once with the adapted model and the recipe."""
_FORM = "FILE.py:NAME, for example my_loss.py:FocalLoss"


def find_factory(spec: str | ObjectiveFactory) -> ObjectiveFactory:
    """The class or function that `FILE.py:NAME` names; anything else is given back as it is.

    Raises RecipeError when there is no such file or name in it, or when it cannot be called with (model, recipe).
    """
    if not isinstance(spec, str):
        return _checked(spec, where=getattr(spec, "__qualname__", repr(spec)))
    return _checked(_named(spec, "--objective"), where=f"--objective {spec}")


def find_rewards(specs: Sequence[str | Callable[..., float]]) -> dict[str, Callable[..., float]]:
    """Reward functions by name, each from `FILE.py:NAME` or as it is given.

    Raises RecipeError for one that is not there, cannot be called with one attempt, or has the name of another.
    """
    found: dict[str, Callable[..., float]] = {}
    for spec in specs:
        reward = _named(spec, "--reward") if isinstance(spec, str) else spec
        name = getattr(reward, "__name__", type(reward).__name__)
        where = f"--reward {spec if isinstance(spec, str) else name}"
        try:
            inspect.signature(reward).bind(None)
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"the reward cannot be called: {error}",
                where=where,
                allowed="a function of one attempt (sample, text, tokens, ended) that gives a number",
                do="change its parameters",
            ) from error
        if name in found:
            raise RecipeError(f"two rewards are named '{name}'", where=where, do="rename one")
        found[name] = reward
    return found


def find_fetch(spec: str | Fetch | None) -> Fetch | None:
    """What brings shards from elsewhere: the function that `FILE.py:NAME` names, or as it is given.

    Raises RecipeError for one that is not there or cannot be called with (url, path).
    """
    if spec is None:
        return None
    found = _named(spec, "--fetch") if isinstance(spec, str) else spec
    try:
        inspect.signature(found).bind(None, None)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the function cannot be called: {error}",
            where=f"--fetch {spec}",
            allowed="a function of (url, path) that writes the file",
            do="change its parameters",
        ) from error
    return found


def _named(spec: str, option: str) -> Any:
    file, colon, name = spec.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise RecipeError(f"'{spec}' is not a name in a file", where=option, allowed=_FORM, do="write it so")
    if not path.is_file():
        raise RecipeError(f"{path} is not a file", where=f"{option} {spec}", allowed=_FORM, do="check the path")
    module = _loaded(path)
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    ]
    if name not in vars(module):
        raise RecipeError(
            f"{path.name} has no '{name}'", where=f"{option} {spec}", allowed=choices(own, word=name), do="name one"
        )
    return vars(module)[name]


def _loaded(path: Path) -> Any:
    name = f"mmft_objective_{sha256_bytes(str(path.resolve()).encode())[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        raise RecipeError(
            f"{path.name} cannot be imported: {type(error).__name__}: {error}",
            where=str(path),
            do=f"run python {path.name}, and mend it",
        ) from error
    return module


def _checked(factory: Any, *, where: str) -> ObjectiveFactory:
    try:
        inspect.signature(factory).bind(None, None)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"the objective cannot be made: {error}",
            where=where,
            allowed="a class or function that takes (model, recipe)",
            do="change its parameters",
        ) from error
    return factory


def make_custom(factory: ObjectiveFactory, model: nn.Module, recipe: Recipe) -> Objective:
    """The objective that the factory makes; what it answers is checked at every step.

    Raises RecipeError when it lacks something that the loop calls, or cannot be called as the loop does.
    """
    made = factory(model, recipe)
    missing = [name for name in ("name", "metrics", "count", "loss") if not hasattr(made, name)]
    if missing:
        raise _misfit(f"{type(made).__name__} has no {', '.join(missing)}")
    for name, arguments in (("count", 1), ("loss", 2)):
        try:
            inspect.signature(getattr(made, name)).bind(*[None] * arguments)
        except (TypeError, ValueError) as error:
            raise _misfit(f"{type(made).__name__}.{name} cannot be called: {error}") from error
    return made if isinstance(made, StepObjective) else _Watched(made)


class _Watched:
    """A user's objective whose answers are looked at before the loop uses them."""

    def __init__(self, made: Objective) -> None:
        self._made = made
        self.name = made.name

    @property
    def metrics(self) -> Mapping[str, tuple[str, str]]:
        return self._made.metrics

    def count(self, batch: Batch) -> int:
        found: object = self._made.count(batch)
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            raise _misfit(f"{self._kind}.count gave {found!r}, no whole number")
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        found: object = self._made.loss(model, batch)
        if not isinstance(found, Loss):
            raise _misfit(f"{self._kind}.loss gave a {type(found).__name__}, not a Loss")
        if not isinstance(found.sum, Tensor) or found.sum.dim() != 0:
            shape = f"of shape {tuple(found.sum.shape)}" if isinstance(found.sum, Tensor) else "that is no tensor"
            raise _misfit(f"{self._kind}.loss gave a sum {shape}, not a scalar")
        if found.count != self.count(batch):
            raise _misfit(f"{self._kind}.loss counted {found.count}, and its count {self.count(batch)}")
        logged = {name for pair in self.metrics.values() for name in pair} - {"count", *found.logs}
        if logged:
            raise _misfit(f"{self._kind}.metrics speaks of {', '.join(sorted(logged))}, which its loss does not log")
        return found

    @property
    def _kind(self) -> str:
        return type(self._made).__name__


def _misfit(what: str) -> RecipeError:
    return RecipeError(
        what,
        where="--objective",
        allowed="name, metrics {NAME: (LOG, LOG or 'count')}, count(batch) -> int, loss(model, batch) -> Loss(sum, "
        "count, logs)",
        do="see recipes/example_objective.py and mmft/objectives/base.py",
    )


def source_digest(factory: Callable[..., Any]) -> str:
    """sha256 of the file the factory stands in, for a resumed run to refuse another (of its type if none)."""
    file = inspect.getsourcefile(factory) if inspect.isclass(factory) or inspect.isfunction(factory) else None
    return sha256_bytes(Path(file).read_bytes() if file else repr(type(factory)).encode())
