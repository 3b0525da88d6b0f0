"""What comes after training: the adapter is kept, merged and proved, all models answer, the report is written."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from mmft.adapters.build import Adapted, set_modes
from mmft.adapters.store import adapter_digest, load_adapter, save_adapter
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import load_backbone
from mmft.backbones.quantize import quantized_names
from mmft.evaluation.report import write_report
from mmft.export.formats import plain_base
from mmft.export.full import save_full
from mmft.export.merge import merge_adapter
from mmft.export.verify import verify_merge
from mmft.files import atomic_folder, write_json
from mmft.kinds import kind_of
from mmft.kinds.base import Datasets, folder_section
from mmft.recipe.load import recipe_digest
from mmft.runfolder import RunFolder, read_json
from mmft.stages import local_folder


def keep_trained(run: RunFolder, adapted: Adapted) -> None:
    """Write `adapter/` (peft layout), or for method `full` `model/` (a whole model folder); complete or absent."""
    base = local_folder(adapted.backbone)
    if adapted.method == "full":
        dtype = run.recipe.export.dtype or run.recipe.model.dtype
        save_full(
            adapted.model,
            adapted.backbone.processor,
            run.model,
            dtype=getattr(torch, dtype),
            max_shard_size=run.recipe.export.max_shard_size,
        )
        return
    with atomic_folder(run.adapter, replace=True) as folder:
        save_adapter(
            adapted,
            folder,
            base_name=adapted.backbone.name,
            base_fingerprint=fingerprint(base),
            recipe_digest=recipe_digest(run.recipe),
        )
        kind_of(run.recipe).keep(run.recipe, adapted, folder)
    run.journal.event("adapter", folder=str(run.adapter), digest=adapter_digest(run.adapter))


def restore_trained(run: RunFolder, *, device: torch.device | None = None) -> Adapted:
    """The run's trained model, loaded from what `keep_trained` wrote."""
    recipe, base = run.recipe, kind_of(run.recipe).base(run.recipe, run.path)
    if recipe.adapter.method == "full":
        trained = load_backbone(folder_section(base, run.model))
        return Adapted(trained.model, trained, (), "full", ())
    backbone = load_backbone(base, recipe.quantization, device=device)
    return Adapted(load_adapter(backbone, run.adapter), backbone, (), recipe.adapter.method, ())


def export_stage(run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
    """Merge and prove; writes `merged/` and `merge_report.json`. Empty when there is nothing to merge.

    Raises ExportError when the proof fails.
    """
    recipe = run.recipe
    if not recipe.export.merge or adapted.method == "full":
        return {}
    if run.merged.exists():
        if stored := read_json(run.merge_report):
            return stored
        # A run that was stopped between merge and proof starts the merge again.
        shutil.rmtree(run.merged)
    run.journal.say(f"merge: onto {recipe.export.merge_onto}, tensor by tensor")
    rows = kind_of(recipe).proof_rows(run, adapted, datasets)
    with plain_base(local_folder(adapted.backbone), run.merged) as base:
        # A checkpoint that is stored quantized is merged onto the weights it computes with.
        here = adapted.backbone.quantized and base == adapted.backbone.folder
        quantized = quantized_names(adapted.backbone.model) if here else []
        merge = merge_adapter(
            base,
            run.adapter,
            run.merged,
            onto=recipe.export.merge_onto if quantized else "base",
            quantization=recipe.quantization if quantized else None,
            quantized_modules=quantized,
            dtype=recipe.export.dtype,
            max_shard_size=recipe.export.max_shard_size,
        )
        was_training = adapted.model.training
        adapted.model.eval()
        proof = verify_merge(base, run.adapter, run.merged, rows=rows, adapter_model=adapted.model)
    further = kind_of(recipe).compare(run, adapted, datasets)
    values = {**merge.to_json(), "folder": str(run.merged), "proof": {**proof.to_json(), **further}}
    if was_training:
        set_modes(adapted)
    write_json(run.merge_report, values)
    return values


def evaluate_stage(run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
    """Every model the recipe compares on every evaluation row; the kind of run writes what it found."""
    if datasets.evals:
        kind_of(run.recipe).evaluate(run, adapted, datasets)


def report_stage(run: RunFolder, merge: dict[str, Any]) -> dict[str, Any]:
    """Score the answers, write `report.json` and `report.html`, return the report."""
    recipe = run.recipe
    # What happened to each single tensor stays in merge_report.json.
    merge = {key: value for key, value in merge.items() if key not in ("changes", "quantized_modules", "files")}
    report: dict[str, Any] = {"name": recipe.name, "training": read_json(run.facts), "merge": merge}
    report |= kind_of(recipe).scores(run)
    report["complete"] = True
    write_json(run.report, report)
    page = write_report(run.path, report)
    report["page"] = str(page.resolve())
    write_json(run.report, report)
    return report
