"""What comes after training: the adapter is kept, merged and proved, all models answer, the report is written."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from mmft.adapters.build import Adapted, set_modes
from mmft.adapters.store import adapter_digest, load_adapter, save_adapter
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import Backbone, load_backbone
from mmft.backbones.quantize import quantized_names
from mmft.data.collate import collate
from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.generate import generate_answers
from mmft.evaluation.report import write_report
from mmft.evaluation.scores import score_records
from mmft.export.formats import plain_base
from mmft.export.full import save_full
from mmft.export.merge import merge_adapter
from mmft.export.verify import verify_merge
from mmft.files import atomic_folder, write_json
from mmft.pairing import (
    compare_embeddings,
    evaluate_pairs,
    folder_section,
    is_paired,
    keep_scales,
    retrieval_scores,
)
from mmft.recipe.load import recipe_digest
from mmft.runfolder import RunFolder, read_json
from mmft.stages import Datasets, local_folder


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
        if is_paired(run.recipe):
            keep_scales(adapted, folder)
    run.journal.event("adapter", folder=str(run.adapter), digest=adapter_digest(run.adapter))


def restore_trained(run: RunFolder) -> Adapted:
    """The run's trained model, loaded from what `keep_trained` wrote."""
    recipe = run.recipe
    if recipe.adapter.method == "full":
        trained = load_backbone(folder_section(recipe.model, run.model))
        return Adapted(trained.model, trained, (), "full", ())
    backbone = load_backbone(recipe.model, recipe.quantization)
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
    rows = _proof_rows(run, adapted.backbone, datasets)
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
    values = {**merge.to_json(), "folder": str(run.merged), "proof": proof.to_json()}
    if isinstance(datasets.renderer, PairRenderer):
        chosen = next(iter(datasets.evals.values()), datasets.train)[: recipe.export.verify_rows]
        values["proof"]["embeddings"] = compare_embeddings(run, adapted, chosen, datasets.renderer)
    if was_training:
        set_modes(adapted)
    write_json(run.merge_report, values)
    return values


def _proof_rows(run: RunFolder, backbone: Backbone, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
    """Real evaluation rows (training rows where there are none), a batch each; pairs are compared by embeddings."""
    if isinstance(datasets.renderer, PairRenderer):
        return []
    samples: list[Sample] = next(iter(datasets.evals.values()), datasets.train)[: run.recipe.export.verify_rows]
    dtype = getattr(torch, run.recipe.model.dtype)
    rows = []
    for sample in samples:
        batch = collate([datasets.chat.render(sample)], pad_token_id=backbone.pad_token_id)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()}
        rows.append({**inputs, "labels": batch.labels})
    return rows


def evaluate_stage(run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
    """Answers of every model to every evaluation row, written to `predictions.jsonl` (pairs: `retrieval.json`).

    Base and adapter are the loaded model with the adapter off and on; the merged model is read back from its folder.
    """
    if not datasets.evals:
        return
    if isinstance(datasets.renderer, PairRenderer):
        evaluate_pairs(run, _models(run, adapted), datasets.evals, datasets.renderer)
        return
    store = PredictionStore()
    for which, model, backbone in _models(run, adapted):
        _answer_all(run, store, which, model, backbone, datasets)
    store.write(run.predictions)


def _models(run: RunFolder, adapted: Adapted) -> Iterator[tuple[str, Any, Backbone]]:
    """(name, model, backbone) of each model the recipe names; at most one beside the trained one is in memory."""
    recipe = run.recipe
    for which in recipe.evaluate.models:
        if which == "adapter":
            yield which, adapted.model, adapted.backbone
        elif which == "base" and adapted.switches:
            with adapted.model.disable_adapter():
                yield which, adapted.model, adapted.backbone
        elif which != "merged" or run.merged.is_dir():
            section = recipe.model if which == "base" else folder_section(recipe.model, run.merged)
            bits = recipe.quantization if which == "base" else None
            other = load_backbone(section, bits, device=next(adapted.model.parameters()).device)
            yield which, other.model, other
            del other
            gc.collect()


def _answer_all(
    run: RunFolder, store: PredictionStore, which: str, model: Any, backbone: Backbone, datasets: Datasets
) -> None:
    evaluate = run.recipe.evaluate
    total = sum(len(samples) for samples in datasets.evals.values())
    with run.journal.progress(total, f"answers of {which}") as bar:
        for name, samples in datasets.evals.items():
            answers = generate_answers(
                model,
                backbone.processor,
                datasets.chat,
                samples,
                batch_size=evaluate.per_device_eval_batch_size,
                max_new_tokens=evaluate.max_new_tokens,
                num_beams=evaluate.num_beams,
                device=next(model.parameters()).device,
                progress=bar.update,
            )
            store.add(name, which, samples, answers=answers, folder=run.path)


def report_stage(run: RunFolder, merge: dict[str, Any]) -> dict[str, Any]:
    """Score the answers, write `report.json` and `report.html`, return the report."""
    recipe = run.recipe
    # What happened to each single tensor stays in merge_report.json.
    merge = {key: value for key, value in merge.items() if key not in ("changes", "quantized_modules", "files")}
    report: dict[str, Any] = {"name": recipe.name, "training": read_json(run.facts), "merge": merge}
    if run.predictions.is_file():
        store = PredictionStore.read(run.predictions)
        models = [which for which in recipe.evaluate.models if which in store.models]
        report |= score_records(
            store.records,
            models,
            recipe.evaluate.metrics,
            group_by=recipe.evaluate.group_by,
            bootstrap_samples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )
    if is_paired(recipe):
        report |= retrieval_scores(run)
    report["complete"] = True
    write_json(run.report, report)
    page = write_report(run.path, report)
    report["page"] = str(page.resolve())
    write_json(run.report, report)
    return report
