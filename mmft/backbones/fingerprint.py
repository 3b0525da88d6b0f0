"""What a model folder is, as sha256 digests: config, weights and processor files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmft.errors import BackboneError
from mmft.files import sha256_file

_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
_LEFT_OUT = ("trainer_state.json", "training_args.json", "MANIFEST.json")


def fingerprint(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every file that decides what the model computes, sorted by name.

    Reads the whole folder once (about a second a gigabyte). Raises BackboneError when it is not a model folder.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} holds no config.json", where=str(folder), do="give a transformers model folder")
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _LEFT_OUT and not path.name.startswith(".")
    ]
    return {path.name: sha256_file(path) for path in files}


def digest(prints: dict[str, str]) -> str:
    """One sha256 for a whole fingerprint: that of its canonical JSON."""
    return hashlib.sha256(json.dumps(prints, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
