"""What was timed once on a machine stays: a choice by the clock would make two runs of a recipe, or a run and its
resumption, compute with other last bits."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from mmft.errors import CheckpointError
from mmft.files import write_json


def kept_times(what: str, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Seconds (theirs, ours) that `measure` gave when `what` was first timed on this processor with this
    torch; kept in `timed.json` of the cache (`MMFT_CACHE`, else `~/.cache/mmft`), where it may be written."""
    path = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser() / "timed.json"
    processor = next((line for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    key = f"{what} | {processor.partition(':')[2].strip()} | {torch.__version__}"
    kept = _read(path)
    if key not in kept:
        theirs, ours = measure()
        kept = {**_read(path), key: [theirs, ours]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
        except (OSError, CheckpointError):
            return theirs, ours
    return kept[key][0], kept[key][1]


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def _read(path: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(path.read_text())
        return {str(name): [float(one), float(other)] for name, (one, other) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
