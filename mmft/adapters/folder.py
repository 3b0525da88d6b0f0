"""Reading an adapter folder: its config, tensors and sidecar, each wrong thing an error by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmft.backbones.fingerprint import digest, fingerprint
from mmft.backbones.load import Backbone
from mmft.errors import AdapterError, choices
from mmft.headers import header_problem
from mmft.recipe.methods import METHODS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained_weights.safetensors"
"""Methods `full` and `bitfit`: the trained weights of the base, by their names in the model."""
SIDECAR = "mmft_adapter.json"
TYPES = {method.peft: name for name, method in METHODS.items() if method.peft is not None}
"""peft's name of a type -> the recipe's method."""
_STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """`mmft_adapter.json`, or None for an adapter of another tool. Raises AdapterError when it cannot be read."""
    path = folder / SIDECAR
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{SIDECAR} cannot be read: {error}", where=str(path), do="copy the adapter again"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("base_fingerprint"), dict):
        raise AdapterError(f"{SIDECAR} has no base_fingerprint", where=str(path), do="copy the adapter again")
    return found


def check_base(backbone: Backbone, sidecar: dict[str, Any], folder: Path) -> None:
    """Raises AdapterError with both digests when the backbone is not the one that the adapter was trained on."""
    if backbone.folder is None:
        return
    expected: dict[str, str] = sidecar["base_fingerprint"]
    actual = fingerprint(backbone.folder)
    if expected == actual:
        return
    differing = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
    raise AdapterError(
        f"this adapter was trained on another base than {backbone.name}: {', '.join(differing[:5])} differ",
        where=str(folder),
        allowed=f"base {sidecar.get('base_name')} with digest {digest(expected)}, not {digest(actual)}",
        do="load it onto the base it was trained on (same revision, unchanged files)",
    )


def read_config(folder: Path) -> Any:
    """The peft config of a folder, for a model that is used and not started anew.

    Raises AdapterError for an unknown type, a config that cannot be read, and one that names code to import.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    import mmft.adapters.bottleneck  # noqa: F401  (registers the type)

    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no {CONFIG}", where=str(folder), do="give the adapter folder of a run (RUN/adapter)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
        if kind not in TYPES:
            raise AdapterError(
                f"adapters of type {kind} cannot be loaded",
                where=str(path),
                allowed=choices([str(name) for name in TYPES]),
                do="train one of these, or load this adapter with peft itself",
            )
        if raw.get("megatron_config"):
            raise AdapterError(
                "the adapter names a module to import (megatron_config), and mmft runs no code for an adapter",
                where=str(path),
                do="take megatron_config out if the adapter does without",
            )
        config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise AdapterError(f"{CONFIG} cannot be read: {error}", where=str(path), do="copy the adapter again") from error
    config.inference_mode = True
    for name in _STARTS:
        if hasattr(config, name):
            setattr(config, name, True)  # a start from the base's weights would change the base
    return config


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises AdapterError when it is missing, damaged or holds NaN."""
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").exists()
        raise AdapterError(
            f"{path.name} is missing" + (" (a pickled adapter_model.bin is not read)" if pickled else ""),
            where=str(path.parent),
            allowed=path.name,
            do="save the adapter as safetensors",
        )
    if problem := header_problem(path):
        raise AdapterError(f"{path.name} is damaged: {problem}", where=str(path), do="copy the adapter again")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path.name} is damaged: {error}", where=str(path), do="copy the adapter again") from error
    refuse_non_finite(tensors, path)
    return tensors


def refuse_non_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises AdapterError with the names of the tensors that hold NaN or infinity."""
    bad = [name for name, value in sorted(tensors.items()) if not bool(torch.isfinite(value).all())]
    if bad:
        raise AdapterError(
            f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:5])}",
            where=str(path),
            do="use an earlier checkpoint",
        )


def compare(found: set[str], expected: set[str], path: Path) -> None:
    """Raises AdapterError with the names of missing or unexpected tensors."""
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise AdapterError(
                f"{len(names)} tensors are {what}: {', '.join(sorted(names)[:5])}",
                where=str(path),
                allowed=f"the {len(expected)} tensors that {CONFIG} describes on this base",
                do="use the base the adapter was trained on, and a complete copy of the adapter",
            )


def unfit(folder: Path, text: str) -> AdapterError:
    """The error for tensors or settings that the base has no place for; `text` is peft's own message."""
    first = next((line.strip() for line in text.splitlines()[1:] if line.strip()), text.strip())[:300]
    return AdapterError(
        f"the adapter does not fit this base: {first}",
        where=str(folder),
        do="load it onto the base it was trained on",
    )


def peft_tensors(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The tensors of one adapter under the names of a peft file."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub whether the vocabulary has grown.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def put_tensors(model: Any, tensors: dict[str, torch.Tensor], folder: Path, *, name: str = "default") -> None:
    """Load tensors of a peft file into an adapter. Raises AdapterError for a name or shape without a place.

    The values are copied by name and read back. peft's own loader comes second: for some families it renames names
    that are right already (its conversion is meant for files of older releases) and drops what then fits nowhere.
    """
    from peft import set_peft_model_state_dict

    held = peft_tensors(model, name)
    tensors = _put_scalars(model, tensors, set(held))
    compare(set(tensors), set(held), folder / WEIGHTS)
    if all(held[key].shape == value.shape for key, value in tensors.items()):
        with torch.no_grad():
            for key, value in tensors.items():  # most methods' tensors share their memory with the parameters
                held[key].copy_(value)
        if not _lost(model, tensors, name):
            return
    try:
        set_peft_model_state_dict(model, dict(tensors), adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise unfit(folder, str(error)) from error
    if lost := _lost(model, tensors, name):
        raise unfit(folder, f"{len(lost)} tensors were not taken over: {', '.join(lost[:5])}")


def _lost(model: Any, tensors: dict[str, torch.Tensor], name: str) -> list[str]:
    """Names of the tensors that the model does not hold after loading."""
    held = peft_tensors(model, name)
    return sorted(key for key, value in tensors.items() if not _is_in(held[key], value))


def _is_in(held: torch.Tensor, value: torch.Tensor) -> bool:
    return held.shape == value.shape and torch.equal(held, value.to(held))


def _put_scalars(model: Any, tensors: dict[str, torch.Tensor], own: set[str]) -> dict[str, torch.Tensor]:
    """Put trained single numbers of the base (a dual encoder's logit_scale), which lie beside the adapter under their
    own names, where they belong; the rest of the tensors."""
    weights = dict(model.named_parameters())
    found = {
        key for key in tensors.keys() - own if key in weights and weights[key].numel() == tensors[key].numel() == 1
    }
    with torch.no_grad():
        for key in found:
            weights[key].copy_(tensors[key].reshape(weights[key].shape))
    return {key: value for key, value in tensors.items() if key not in found}


def put_weights(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Load trained weights of the base itself, by their names in the model."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    unexpected = sorted(set(tensors) - set(weights))
    if unexpected:
        compare(set(tensors), set(tensors) - set(unexpected), folder / TRAINED)
    with torch.no_grad():
        for name, value in tensors.items():
            if weights[name].shape != value.shape:
                raise unfit(folder, f"{name} is {tuple(value.shape)}, not {tuple(weights[name].shape)}")
            weights[name].copy_(value)
