"""Adapters on disk: an ordinary peft folder plus `mmft_adapter.json`, which says what base it belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmft.adapters.build import Adapted
from mmft.adapters.folder import (
    CONFIG,
    SIDECAR,
    TRAINED,
    WEIGHTS,
    check_base,
    put_tensors,
    put_weights,
    read_config,
    read_sidecar,
    read_tensors,
    refuse_non_finite,
    unfit,
)
from mmft.adapters.naming import names_as_given
from mmft.adapters.ranks import settle_ranks
from mmft.adapters.starts import as_plain_lora
from mmft.backbones.fingerprint import digest
from mmft.backbones.load import Backbone
from mmft.errors import AdapterError
from mmft.files import sha256_bytes, sha256_file, write_json
from mmft.recipe.methods import METHODS

__all__ = [
    "CONFIG",
    "SIDECAR",
    "TRAINED",
    "WEIGHTS",
    "adapter_digest",
    "check_base",
    "load_adapter",
    "load_adapters",
    "read_sidecar",
    "save_adapter",
]
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

    The caller makes the folder atomic. With the methods `full` and `bitfit` the trained weights are written, under
    the model's names; `model.load_state_dict(load_file(...), strict=False)` of plain transformers loads them. An
    adapter that started from a part of the weights (`pissa`, `olora`) is written as an ordinary LoRA of twice the
    rank for the base as it is. Raises AdapterError when a tensor is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if METHODS[adapted.method].peft is None:
        tensors = {name: value.detach() for name, value in adapted.trainable().items()}
        file = TRAINED
    else:
        settle_ranks(adapted.model)
        tensors, config = as_plain_lora(adapted.model)
        file = WEIGHTS
        config.base_model_name_or_path, config.inference_mode = base_name, True
        config.save_pretrained(str(folder))
    refuse_non_finite(tensors, folder / file)
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}
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
    """The backbone's model with the adapter of `folder` on it, frozen and in eval mode: a PeftModel (`full` and
    `bitfit`: the model itself with its trained weights replaced).

    Raises AdapterError when the folder is no adapter, was trained on another base, holds missing, unexpected or
    misshapen tensors, or a value that is not finite. A plain peft folder, without a fingerprint, is accepted.
    """
    sidecar = read_sidecar(folder)
    if sidecar is not None and (method := METHODS.get(str(sidecar.get("method")))) and method.peft is None:
        check_base(backbone, sidecar, folder)
        put_weights(backbone.model, read_tensors(folder / TRAINED), folder)
        return backbone.model.eval()
    return load_adapters(backbone, {"default": folder})


def load_adapters(backbone: Backbone, folders: Mapping[str, Path]) -> Any:
    """One model with several adapters by name, frozen and in eval mode; the first one is active.

    `model.set_adapter(name)` switches, `with model.disable_adapter()` gives the base. All must be of one peft type;
    prompts and prefixes do not share a model. Raises AdapterError as `load_adapter` does.
    """
    from peft import get_peft_model

    model: Any = None
    for name, folder in folders.items():
        sidecar = read_sidecar(folder)
        if sidecar is not None:
            check_base(backbone, sidecar, folder)
            if (known := METHODS.get(str(sidecar.get("method")))) and known.peft is None:
                raise AdapterError(
                    f"{folder} holds weights of the base (method {sidecar['method']}), which replace each other",
                    where=str(folder),
                    do="load it alone",
                )
        config = read_config(folder)
        tensors = read_tensors(folder / WEIGHTS)
        try:
            # An adapter without our sidecar may carry the names of transformers 4, which peft converts.
            with nullcontext() if sidecar is None else names_as_given(backbone.model, config):
                if model is None:
                    model = get_peft_model(backbone.model, config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
        except (ValueError, TypeError, KeyError) as error:
            raise unfit(folder, str(error)) from error
        put_tensors(model, tensors, folder, name=name)
    if model is None:
        raise AdapterError("no adapter folder is given", do="give one or more")
    if len(folders) > 1:
        model.set_adapter(next(iter(folders)))
    model.requires_grad_(False)
    return model.eval()


def adapter_digest(folder: Path) -> str:
    """sha256 of the adapter: its config and weights, by name. The sidecar is left out."""
    lines = [f"{name} {sha256_file(folder / name)}" for name in (CONFIG, WEIGHTS, TRAINED) if (folder / name).is_file()]
    if not lines:
        raise AdapterError(f"{folder} holds no adapter", where=str(folder), do=f"give a folder with {CONFIG}")
    return sha256_bytes("\n".join(lines).encode())
