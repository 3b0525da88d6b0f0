"""What a contrastive run does differently from a run of conversations, station by station of the story."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmft.adapters.build import PREFIX, Adapted, ParamGroup
from mmft.adapters.folder import WEIGHTS
from mmft.backbones.load import load_backbone
from mmft.data.formats import Loaded
from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.errors import DataError, ExportError
from mmft.evaluation.pairs import embed_pairs, largest_difference, score_pairs
from mmft.files import write_json
from mmft.objectives.contrastive_embed import scales
from mmft.recipe.schema import ModelSection, Recipe
from mmft.runfolder import RunFolder, read_json

RESULT = "retrieval.json"
_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""What a component of a vector of length one may be off by in a merged model: its type's rounding through the tower."""
Model = tuple[str, Any, Any]


def is_paired(recipe: Recipe) -> bool:
    """Whether the run learns from pairs."""
    return recipe.objective.name == "contrastive"


def make_pair_renderer(recipe: Recipe, processor: Any) -> PairRenderer:
    """The renderer of pairs a recipe asks for. Raises DataError for a processor that cannot."""
    return PairRenderer(
        processor,
        max_length=recipe.data.max_length,
        over_length=recipe.data.over_length,
        max_image_pixels=recipe.data.max_image_pixels,
        captions=recipe.objective.captions_per_image,
        seed=recipe.train.seed,
    )


def check_dialects(recipe: Recipe, sets: Sequence[Loaded]) -> None:
    """Raise DataError for rows of the other kind: pairs for `sft`, conversations for `contrastive`."""
    for one in sets:
        if (one.format == "pairs") != is_paired(recipe):
            raise DataError(
                f"the rows of '{one.name}' are {one.format}, and objective.name is {recipe.objective.name}",
                where=one.samples[0].where if one.samples else one.name,
                allowed="pairs (image and caption) for contrastive; messages, llava or qa for sft",
                do="change objective.name, or set data.train[].format",
            )


def free_scales(adapted: Adapted, recipe: Recipe) -> Adapted:
    """The adapted model with the scale and bias of its similarities trained too, where the recipe asks for it."""
    if not is_paired(recipe) or not recipe.objective.train_logit_scale:
        return adapted
    learned = scales(adapted.model)
    for value in learned.values():
        value.requires_grad_(True)
    known = {name for group in adapted.groups for name in group.names}
    names = tuple(name for name, value in adapted.trainable().items() if name not in known)
    if not names:
        return adapted
    return dataclasses.replace(adapted, groups=(*adapted.groups, ParamGroup(adapted.home(names[0])[0], names, None)))


def keep_scales(adapted: Adapted, folder: Path) -> None:
    """Put the trained scale and bias into the adapter's weights, where plain peft and the merge find them: under the
    names of the base's own parameters."""
    learned = {name: value for name, value in scales(adapted.model).items() if value.requires_grad}
    path = folder / WEIGHTS
    if not learned or not path.is_file():
        return
    mode = path.stat().st_mode & 0o777
    tensors = load_file(path) | {PREFIX + name: value.detach().cpu().float().clone() for name, value in learned.items()}
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
    path.chmod(mode)


def evaluate_pairs(
    run: RunFolder, models: Iterator[Model], evals: dict[str, list[Sample]], renderer: PairRenderer
) -> None:
    """Retrieval of every model on every set, written to `retrieval.json`."""
    found = {}
    size, total = run.recipe.evaluate.per_device_eval_batch_size, sum(map(len, evals.values()))
    for which, model, _ in models:
        with run.journal.progress(total, f"embeddings of {which}") as bar:
            found[which] = {
                name: embed_pairs(model, renderer, samples, batch_size=size, progress=bar.update)
                for name, samples in evals.items()
            }
    scored = score_pairs(found, bootstrap_samples=run.recipe.evaluate.bootstrap_samples, seed=run.recipe.train.seed)
    write_json(run.path / RESULT, scored)


def retrieval_scores(run: RunFolder) -> dict[str, Any]:
    """What `evaluate_pairs` wrote; empty before that."""
    return read_json(run.path / RESULT)


def compare_embeddings(
    run: RunFolder, adapted: Adapted, samples: Sequence[Sample], renderer: PairRenderer
) -> dict[str, Any]:
    """The merged folder's embeddings against the adapter model's, on a few rows.

    Raises ExportError when they differ by more than the weights' type rounds (checked unless the base is quantized and
    the merge was onto the original weights).
    """
    if not samples:
        return {}
    recipe = run.recipe
    ours = embed_pairs(adapted.model, renderer, samples, batch_size=len(samples))
    other = load_backbone(folder_section(recipe.model, run.merged), device=next(adapted.model.parameters()).device)
    theirs = embed_pairs(other.model, renderer, samples, batch_size=len(samples))
    found = largest_difference(ours, theirs)
    limit = max(_LIMITS[kind] for kind in {other.model.dtype, getattr(torch, recipe.export.dtype or "float32")})
    limit = _LIMITS[torch.bfloat16] if adapted.backbone.quantized else limit
    checked = not adapted.backbone.quantized or recipe.export.merge_onto == "dequantized"
    del other
    gc.collect()
    if checked and not found <= limit:
        raise ExportError(
            f"the merged model's embeddings differ from the adapter model's by {found:.3g} (allowed {limit:g})",
            where=str(run.merged),
            do="look at merge_report.json",
        )
    return {"rows": len(samples), "max_difference": found, "limit": limit, "checked": checked}


def folder_section(section: ModelSection, folder: Path) -> ModelSection:
    """The model section of a recipe, for a folder that stands in for its base."""
    return section.model_copy(update={"name_or_path": str(folder), "revision": None})
