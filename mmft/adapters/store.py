"""Adapters on disk: an ordinary peft folder plus `mmft_adapter.json`, which says what base it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmft.adapters.build import Adapted
from mmft.backbones.fingerprint import digest, fingerprint
from mmft.backbones.load import Backbone
from mmft.errors import AdapterError
from mmft.files import sha256_bytes, sha256_file, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained_weights.safetensors"
"""Method `full`: the trained weights of the base, by their names in the model."""
SIDECAR = "mmft_adapter.json"
_SIDECAR_FORMAT = 1


def save_adapter(
    adapted: Adapted,
    folder: Path,
    *,
    base_name: str,
    base_fingerprint: dict[str, str],
    recipe_digest: str,
) -> None:
    """Write the adapter into `folder` (made if missing), with modes by umask. Plain peft loads the result.

    The caller makes the folder atomic. With method `full` the trained weights are written, under the model's names.
    Raises AdapterError when a tensor is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if adapted.method == "full":
        tensors = {name: value.detach() for name, value in adapted.trainable().items()}
        file = TRAINED
    else:
        tensors, file = _peft_tensors(adapted.model), WEIGHTS
        config = adapted.model.peft_config["default"]
        kept = config.base_model_name_or_path, config.inference_mode
        config.base_model_name_or_path, config.inference_mode = base_name, True
        try:
            config.save_pretrained(str(folder))
        finally:
            config.base_model_name_or_path, config.inference_mode = kept
    _refuse_non_finite(tensors, folder / file)
    plain = {name: value.contiguous().cpu() for name, value in sorted(tensors.items())}
    save_file(plain, folder / file, metadata={"format": "pt"})
    write_json(
        folder / SIDECAR,
        {
            "format": _SIDECAR_FORMAT,
            "method": adapted.method,
            "base_name": base_name,
            "base_digest": digest(base_fingerprint),
            "base_fingerprint": base_fingerprint,
            "recipe_digest": recipe_digest,
            "targets": [[target.part, target.sub, target.mode] for target in adapted.targets],
        },
    )
    mode = (folder / SIDECAR).stat().st_mode & 0o777  # written by mode of the umask; safetensors always writes 0600
    for name in (CONFIG, file):
        if (folder / name).exists():
            os.chmod(folder / name, mode)


def load_adapter(backbone: Backbone, folder: Path) -> Any:
    """The backbone's model with the adapter of `folder` on it, frozen and in eval mode: a PeftModel (`full`: the
    model itself with its trained weights replaced).

    Raises AdapterError when the folder is no adapter, was trained on another base, holds missing, unexpected or
    misshapen tensors, or a value that is not finite. A plain peft folder, without a fingerprint, is accepted.
    """
    sidecar = read_sidecar(folder)
    if sidecar is not None:
        check_base(backbone, sidecar, folder)
        if sidecar.get("method") == "full":
            return _load_full(backbone, folder)
    config = _lora_config(folder)
    tensors = _read(folder / WEIGHTS)
    from peft import get_peft_model, set_peft_model_state_dict

    try:
        model: Any = get_peft_model(backbone.model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise _unfit(folder, str(error)) from error
    _compare(set(tensors), set(_peft_tensors(model)), folder / WEIGHTS)
    try:
        set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise _unfit(folder, str(error)) from error
    model.requires_grad_(False)
    return model.eval()


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


def adapter_digest(folder: Path) -> str:
    """sha256 of the adapter: its config and weights, by name. The sidecar is left out."""
    lines = [f"{name} {sha256_file(folder / name)}" for name in (CONFIG, WEIGHTS, TRAINED) if (folder / name).is_file()]
    if not lines:
        raise AdapterError(f"{folder} holds no adapter", where=str(folder), do=f"give a folder with {CONFIG}")
    return sha256_bytes("\n".join(lines).encode())


def _peft_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of a peft file."""
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub whether the vocabulary has grown.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _lora_config(folder: Path) -> Any:
    from peft import LoraConfig

    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} holds no {CONFIG}", where=str(folder), do="give the adapter folder of a run (RUN/adapter)"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"adapters of type {kind} cannot be loaded",
                where=str(path),
                allowed="LORA",
                do="train a LoRA adapter, or load this one with peft itself",
            )
        config: Any = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{CONFIG} cannot be read: {error}", where=str(path), do="copy the adapter again") from error
    config.inference_mode = True
    config.init_lora_weights = True
    return config


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin").exists()
        raise AdapterError(
            f"{path.name} is missing" + (" (a pickled adapter_model.bin is not read)" if pickled else ""),
            where=str(path.parent),
            allowed=path.name,
            do="save the adapter as safetensors",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path.name} is damaged: {error}", where=str(path), do="copy the adapter again") from error
    _refuse_non_finite(tensors, path)
    return tensors


def _refuse_non_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    bad = [name for name, value in sorted(tensors.items()) if not bool(torch.isfinite(value).all())]
    if bad:
        raise AdapterError(
            f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:5])}",
            where=str(path),
            do="use an earlier checkpoint",
        )


def _compare(found: set[str], expected: set[str], path: Path) -> None:
    for what, names in (("missing", expected - found), ("unexpected", found - expected)):
        if names:
            raise AdapterError(
                f"{len(names)} tensors are {what}: {', '.join(sorted(names)[:5])}",
                where=str(path),
                allowed=f"the {len(expected)} tensors that {CONFIG} describes on this base",
                do="use the base the adapter was trained on, and a complete copy of the adapter",
            )


def _unfit(folder: Path, text: str) -> AdapterError:
    first = next((line.strip() for line in text.splitlines()[1:] if line.strip()), text.strip())[:300]
    return AdapterError(
        f"the adapter does not fit this base: {first}",
        where=str(folder),
        do="load it onto the base it was trained on",
    )


def _load_full(backbone: Backbone, folder: Path) -> Any:
    tensors = _read(folder / TRAINED)
    weights = dict(backbone.model.named_parameters(remove_duplicate=False))
    unexpected = sorted(set(tensors) - set(weights))
    if unexpected:
        _compare(set(tensors), set(tensors) - set(unexpected), folder / TRAINED)
    with torch.no_grad():
        for name, value in tensors.items():
            if weights[name].shape != value.shape:
                raise _unfit(folder, f"{name} is {tuple(value.shape)}, not {tuple(weights[name].shape)}")
            weights[name].copy_(value)
    return backbone.model.eval()
