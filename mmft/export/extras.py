"""The error of a format whose package is not installed."""

from __future__ import annotations

from mmft.errors import ExportError


def needs(package: str, extra: str) -> ExportError:
    """What to raise when `package`, which the extra brings, cannot be imported."""
    return ExportError(
        f"the package {package} is not installed", where=f"extra {extra}", do=f"pip install 'mmft[{extra}]'"
    )
