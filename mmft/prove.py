"""`mmft merge` and `mmft verify`: the export room's verbs on folders, outside of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmft.adapters.store import CONFIG, check_base, read_sidecar
from mmft.backbones.load import load_backbone, meta_backbone, resolve_model
from mmft.data.stream_files import Fetch
from mmft.errors import AdapterError, BackboneError, ExportError, RecipeError
from mmft.export.formats import plain_base
from mmft.export.merge import merge_adapter
from mmft.export.verify import verify_merge
from mmft.files import read_json_file
from mmft.kinds.custom import find_fetch
from mmft.outcome import export_stage, restore_trained
from mmft.recipe.schema import ModelSection
from mmft.runfolder import find_run, read_json
from mmft.stages import load_datasets

ONTO = ("base", "dequantized")


def merge_folder(
    adapter: str | Path,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    onto: str | None = None,
    fetch: str | Fetch | None = None,
) -> dict[str, Any]:
    """Merge a run's adapter (as its recipe says, `onto` apart, with its proof) or an adapter folder onto its base.

    Raises AdapterError for another base than the adapter was trained on, ExportError when the target exists or an
    adapter tensor has no home.
    """
    if onto is not None and onto not in ONTO:
        raise RecipeError(
            f"--onto {onto} is unknown", where="--onto", allowed=", ".join(ONTO), do="choose one of the two"
        )
    folder = Path(adapter)
    if (folder / "recipe.yaml").is_file():
        return _merge_run(folder, base=base, out=out, onto=onto, fetch=find_fetch(fetch))
    if fetch is not None:
        raise RecipeError("an adapter folder has no rows", where="--fetch", do="leave it out, or merge the run folder")
    if out is None:
        raise RecipeError("no folder to write to", where="--out", do="give --out FOLDER")
    if onto == "dequantized":
        raise RecipeError(
            "an adapter folder alone does not say how its base was quantized",
            where="--onto dequantized",
            allowed="base; dequantized for a run folder",
            do="merge the run folder",
        )
    source = base_folder(base or base_of(folder))
    if (sidecar := read_sidecar(folder)) is not None:
        check_base(meta_backbone(ModelSection(name_or_path=str(source))), sidecar, folder)
    with plain_base(source, Path(out)) as plain:
        report = merge_adapter(plain, folder, Path(out), onto="base")
        proof = verify_merge(plain, folder, Path(out))
    return {**report.to_json(), "folder": str(out), "proof": proof.to_json()}


def _merge_run(
    folder: Path, *, base: str | None, out: str | Path | None, onto: str | None, fetch: Fetch | None
) -> dict[str, Any]:
    if base is not None or out is not None:
        raise RecipeError(
            "a run is merged onto its own base, into its own merged/",
            where="--base" if base is not None else "--out",
            do=f"leave it out, or merge the adapter folder {folder / 'adapter'}",
        )
    run = find_run(folder)
    export = run.recipe.export.model_copy(update={"merge": True, **({"merge_onto": onto} if onto else {})})
    if run.merged.exists() and onto and (there := read_json(run.merge_report).get("onto")) not in (None, onto):
        raise ExportError(
            f"merged/ exists already, onto {there}", where=str(run.merged), do="delete it, and merge again"
        )
    run = replace(run, recipe=run.recipe.model_copy(update={"export": export}))
    adapted = restore_trained(run)
    datasets = load_datasets(run.recipe, adapted.backbone.processor, run.journal, fetch=fetch)
    return export_stage(run, adapted, datasets)


def verify_folder_merge(base: str, adapter: str | Path, merged: str | Path) -> dict[str, Any]:
    """Prove `merged == base + adapter` tensor by tensor; raises ExportError when it is not."""
    with plain_base(base_folder(base), Path(merged)) as plain:
        proof = verify_merge(plain, Path(adapter), Path(merged))
    return {"folder": str(merged), "proof": proof.to_json()}


def base_of(adapter: Path) -> str:
    """The base an adapter folder names. Raises AdapterError when it names none."""
    sidecar = read_sidecar(adapter) or {}
    config = read_json_file(adapter / CONFIG) if (adapter / CONFIG).is_file() else {}
    name = sidecar.get("base_name") or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            f"{adapter} names no base model", where=str(adapter / CONFIG), do="give the base with --base"
        )
    return name


def base_folder(name: str) -> Path:
    """The local files of a model: a folder, a shipped one, or the hub cache's snapshot."""
    _, folder = resolve_model(name)
    folder = folder or load_backbone(ModelSection(name_or_path=name)).folder
    if folder is None:
        raise BackboneError(f"{name} has no local files", where=name, do="give a folder")
    return folder
