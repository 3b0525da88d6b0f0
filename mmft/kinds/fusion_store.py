"""The cached tokens of a fusion run's frozen encoders: which encoders, whose name in the cache, when it is refused."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted
from mmft.data.audit import fingerprint
from mmft.data.fused import FusedRenderer
from mmft.data.sample import Sample
from mmft.data.tables import modality_name
from mmft.errors import RecipeError
from mmft.evaluation.classes import inner
from mmft.fast.slabs import GRACE, cache_folder, evict
from mmft.files import sha256_bytes, to_json
from mmft.fusion.store import FeatureStore
from mmft.kinds.base import Datasets
from mmft.lock import one_at_a_time
from mmft.paths import cache_limit
from mmft.recipe.schema import Recipe

_BATCH = 16


def stored_features(recipe: Recipe, adapted: Adapted, datasets: Datasets, renderer: FusedRenderer) -> None:
    """Give the renderer the tokens of every encoder that nothing trains, computed now where the cache has none.

    The first rank that comes computes, the others wait. Raises RecipeError when `cache_features: true` and an encoder
    is trained.
    """
    wanted = recipe.objective.cache_features
    trained = _trained(adapted)
    fusion = inner(adapted.model)
    moving = set(_changing(datasets)) if wanted is not False else set()
    if wanted and moving:
        raise RecipeError(
            f"the pictures of '{min(moving)}' are changed anew in each epoch, so their tokens change too",
            where="objective.cache_features: true",
            allowed="data.augmentation for runs that cache no pictures",
            do="take one of the two fields out",
        )
    names = [name for name in fusion.encoders if name not in trained and name not in moving]
    if wanted and trained:
        name, parameter = next(iter(sorted(trained.items())))
        raise RecipeError(
            f"the encoder of '{name}' is trained ({parameter}), so its tokens change with every step",
            where="objective.cache_features: true",
            allowed="encoders that nothing trains; without the field those alone are cached",
            do="take the field out, or the encoder's part out of adapter.targets",
        )
    if wanted is False or not names:
        renderer.use(None)
        return
    rows = list(
        {(one.source, one.id): one for part in (datasets.train, *datasets.evals.values()) for one in part}.values()
    )
    path = _folder() / f"{_digest(recipe, adapted, renderer, rows, names)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path.with_suffix(".lock")):
        if not path.is_file():
            renderer.use(None)
            with torch.autocast(fusion.device.type, dtype=torch.bfloat16, enabled=recipe.train.bf16):
                FeatureStore.build(path, fusion, _batches(renderer, rows, fusion), names)
            evict(_folder(), limit=cache_limit(), since=time.time() - GRACE)
    renderer.use(FeatureStore.open(path), rows)


def _changing(datasets: Datasets) -> set[str]:
    """Modalities whose training pictures are changed from epoch to epoch."""
    rows = [sample for sample in datasets.train if sample.augment is not None]
    return {modality_name(name) for sample in rows for name, cell in sample.cells.items() if cell.kind == "image"}


def _folder() -> Path:
    return cache_folder()


def _trained(adapted: Adapted) -> dict[str, str]:
    """Modality -> the first trained parameter of its encoder."""
    found: dict[str, str] = {}
    for name in adapted.trainable():
        plain = name.removeprefix("base_model.model.")
        if plain.startswith("encoders."):
            found.setdefault(plain.split(".")[1], name)
    return found


def _batches(renderer: FusedRenderer, rows: Sequence[Sample], fusion: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), _BATCH):
        yield renderer.place(renderer.inputs(rows[start : start + _BATCH]), fusion)


def _digest(
    recipe: Recipe, adapted: Adapted, renderer: FusedRenderer, rows: Sequence[Sample], names: Sequence[str]
) -> str:
    """What the tokens depend on: the encoders' weights as they are in memory, their processors, the rows, precision."""
    fusion, weights = inner(adapted.model), hashlib.sha256()
    for name in names:
        for key, value in sorted(fusion.encoders[name].state_dict().items()):
            weights.update(f"{name} {key} {value.dtype} {tuple(value.shape)}".encode())
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    processor = renderer.processor
    parts = {name: _described(part) for name, (_, part) in processor.parts.items() if name in names}
    held = [parts, processor.max_length, processor.max_frames, recipe.train.bf16, fingerprint(rows), list(names)]
    return sha256_bytes((to_json(held) + weights.hexdigest()).encode())[:32]


def _described(part: Any) -> str:
    tokenizer = getattr(part, "backend_tokenizer", None)
    return sha256_bytes((tokenizer.to_str() if tokenizer is not None else repr(part)).encode())
