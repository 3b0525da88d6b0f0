"""An adapter folder with the key layout of a named transformers version.

transformers 4.52 and 5 moved modules (`language_model.model.layers…` became `model.language_model.layers…`); the old
names are those of the checkpoint on disk, so the loader's own conversion, turned round, gives them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmft.errors import ExportError
from mmft.export.delta import CONFIG, WEIGHTS, module_of_keys, open_adapter, resolve_updates
from mmft.export.names import NameMap, map_names, meta_model
from mmft.export.shards import Weights, weight_files
from mmft.export.writer import hashed_folder

CURRENT = "current"
LAYOUTS = (CURRENT, "4.51")
_PEFT = "base_model.model."


def export_layout(adapter_folder: Path, out: Path, layout: str, *, base: Path | None = None) -> dict[str, str]:
    """Write the adapter at `out` with keys and target_modules as `layout` names them; key before -> key after.

    `base` is the folder of the base model (else the one that the adapter's config names). The layout "4.51" (or
    "transformers-4.51") is that of transformers before 4.52. Raises ExportError for another layout, a tensor without a
    home in the base, or a module that the older layout has not as one module.
    """
    adapter_folder, out, layout = Path(adapter_folder), Path(out), layout.removeprefix("transformers-")
    if layout not in LAYOUTS:
        raise ExportError(
            f"layout {layout!r} is unknown", where="layout", allowed=", ".join(LAYOUTS), do="choose one of them"
        )
    adapter = open_adapter(adapter_folder)
    base = Path(base or adapter.options.get("base_model_name_or_path") or "")
    if not (base / "config.json").is_file():
        adapter.weights.close()
        raise ExportError(
            f"the base model {str(base)!r} is not a folder here", where="base", do="give the folder of the base model"
        )
    with adapter.weights, Weights(weight_files(base)) as weights:
        names = map_names(meta_model(base), weights.entries)
        resolve_updates(adapter, names)  # every tensor has a home, or this names those that have none
        renamed: dict[str, str] = {}
        modules: dict[str, str] = {}
        for key, (module, part, wrapped) in module_of_keys(adapter, names).items():
            new = module if layout == CURRENT or not module else _before(module, names)
            renamed[key] = f"{_PEFT}{new}{wrapped}.{part}" if module else f"base_model.{part}"
            if wrapped is not None and module:
                modules[module] = new
        config = json.loads((adapter_folder / CONFIG).read_bytes())
        if config.get("target_modules"):
            taken = {module for key, (module, part, _) in module_of_keys(adapter, names).items() if _adapts(part)}
            config["target_modules"] = sorted(modules[module] for module in taken)
            config["exclude_modules"] = None
        tensors: dict[str, torch.Tensor] = {new: adapter.weights.read(key) for key, new in renamed.items()}
        with hashed_folder(out) as (folder, _):
            for path in sorted(adapter_folder.iterdir()):
                if path.is_file() and path.name not in (WEIGHTS, CONFIG, "MANIFEST.json") and path.suffix != ".bin":
                    shutil.copyfile(path, folder / path.name)
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return renamed


def _adapts(part: str) -> bool:
    """Whether the tensor belongs to an adapted module, not to one that is saved whole."""
    return part.split(".")[0] not in ("weight", "bias", "token_adapter")


def _before(module: str, names: NameMap) -> str:
    leaf = "weight" if f"{module}.weight" in names.shapes else None
    if leaf is None:
        raise ExportError(
            f"{module} holds several weights in memory that were modules of their own before transformers 5",
            where="layout",
            allowed=CURRENT,
            do="keep the current layout for this adapter",
        )
    return names.before(f"{module}.{leaf}").removesuffix(f".{leaf}")
