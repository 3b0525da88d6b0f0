"""Evaluation of a run on pairs: retrieval, classes where rows have one, and the models between base and tuned."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmft.adapters.build import Adapted
from mmft.backbones.load import load_backbone
from mmft.data.pairs import PairRenderer
from mmft.evaluation.pair_classes import ClassEmbeddings, class_names, embed_classes, score_classes
from mmft.evaluation.pairs import PairEmbeddings, embed_pairs, score_pairs
from mmft.export.interpolate import between, interpolate_models
from mmft.kinds.base import Datasets, folder_section, models
from mmft.recipe.schema import ModelSection
from mmft.runfolder import RunFolder

Embedded = dict[str, dict[str, PairEmbeddings]]
INTERPOLATED = "interpolated"


def evaluate_pairs(run: RunFolder, adapted: Adapted, datasets: Datasets, base: ModelSection) -> dict[str, Any]:
    """`headline`, `scores`, `sets`, and `interpolation` and `charts` where the recipe asks for models between."""
    assert isinstance(datasets.renderer, PairRenderer)
    evaluate, seed = run.recipe.evaluate, run.recipe.train.seed
    classes = class_names(evaluate.class_tag, datasets.train, datasets.evals) if evaluate.class_tag else []
    found: Embedded = {}
    labelled: dict[str, ClassEmbeddings] = {}
    for which, model, _ in models(run, adapted, base):
        found[which] = _embed_sets(run, model, datasets, which)
        if classes:
            labelled[which] = embed_classes(
                model,
                datasets.renderer,
                classes=classes,
                templates=evaluate.templates,
                train=datasets.train,
                tag=str(evaluate.class_tag),
                batch_size=evaluate.per_device_eval_batch_size,
            )
    scored = score_pairs(found, bootstrap_samples=evaluate.bootstrap_samples, seed=seed)
    for name, samples in datasets.evals.items() if classes else ():
        scores, paired = score_classes(
            {which: embedded[name].left for which, embedded in found.items()},
            labelled,
            [classes.index(sample.tags[str(evaluate.class_tag)]) for sample in samples],
            resamples=evaluate.bootstrap_samples,
            seed=seed,
        )
        for which, values in scores.items():
            scored["sets"][name]["scores"][which] |= values
        for pair, values in paired.items():
            scored["sets"][name]["paired"][pair]["metrics"] |= values
    return scored | _interpolation(run, datasets, base, scored)


def _embed_sets(run: RunFolder, model: Any, datasets: Datasets, which: str) -> dict[str, PairEmbeddings]:
    assert isinstance(datasets.renderer, PairRenderer)
    size, total = run.recipe.evaluate.per_device_eval_batch_size, sum(map(len, datasets.evals.values()))
    with run.journal.progress(total, f"embeddings of {which}") as bar:
        return {
            name: embed_pairs(model, datasets.renderer, samples, batch_size=size, progress=bar.update)
            for name, samples in datasets.evals.items()
        }


def _interpolation(run: RunFolder, datasets: Datasets, base: ModelSection, scored: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the models between base and tuned; the first of them is written to `interpolated/`."""
    alphas = run.recipe.export.interpolate
    tuned = run.model if run.recipe.adapter.method == "full" else run.merged
    if not alphas or not tuned.is_dir():
        return {}
    folder = run.path / INTERPOLATED
    first, last = load_backbone(base), load_backbone(folder_section(base, tuned))
    if first.folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        size = run.recipe.export.max_shard_size
        interpolate_models(first.folder, tuned, folder, alpha=alphas[0], max_shard_size=size)
    points = {
        f"{alpha:g}": _embed_sets(run, last.model, datasets, f"the model at {alpha:g}")
        for alpha in between(first.model, last.model, alphas)
    }
    del first, last
    gc.collect()
    evaluate, seed = run.recipe.evaluate, run.recipe.train.seed
    sets = score_pairs(points, bootstrap_samples=evaluate.bootstrap_samples, seed=seed)["sets"]
    ends = {"0": "base", "1": "merged" if tuned == run.merged else "adapter"}
    headline, curves, scores = scored["headline"], {}, {}
    for name, one in sets.items():
        known = scored["sets"][name]["scores"]
        rows = {**one["scores"], **{alpha: known[which] for alpha, which in ends.items() if which in known}}
        scores[name] = {alpha: rows[alpha] for alpha in sorted(rows, key=float)}
        curves[name] = [[float(alpha), row[headline]["value"]] for alpha, row in scores[name].items()]
    return {
        "interpolation": {"written": alphas[0], "folder": _shown(folder), "sets": scores},
        "charts": [{"title": f"{headline} between base (0) and tuned (1)", "x_label": "alpha", "series": curves}],
    }


def _shown(folder: Path) -> str | None:
    return str(folder) if folder.is_dir() else None
