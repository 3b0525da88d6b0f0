"""A module's class replaced by a subclass of itself, and put back."""

from __future__ import annotations

from typing import Any

_MADE: dict[tuple[Any, Any], Any] = {}


def swapped(mixin: Any, kind: Any) -> Any:
    """The class `kind` with `mixin` before it, under its own name; one class for each pair."""
    if (mixin, kind) not in _MADE:
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _MADE[mixin, kind] = type(kind.__name__, (mixin, kind), names)
    return _MADE[mixin, kind]
