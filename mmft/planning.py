"""`mmft plan` and `mmft preview`: what a recipe would do, before a weight is loaded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import Backbone, load_processor, meta_backbone, meta_model
from mmft.backbones.parts import find_parts
from mmft.data.formats import load_all, source_name
from mmft.data.loader import RowRenderer
from mmft.data.sample import Sample
from mmft.data.steps import plan_steps
from mmft.engine.step_memory import held as held_now
from mmft.errors import BackboneError
from mmft.fast.known import fast_plan
from mmft.fast.plan import Setting
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.base import Kind
from mmft.kinds.streams import rows_as_read, spaced
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import ModelSection, Recipe
from mmft.stages import fitting

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROBE_ROWS = 256


def make_plan(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Parts, trainable counts, rows, token percentiles, steps, memory estimate; nothing is trained or downloaded.

    Token lengths are those of up to 256 rows, rendered with the real processor. When the hub is out of reach and
    `model.model_type` is given, sizes are the defaults of that family, and a note says so.
    """
    begin = time.monotonic()
    loaded = load_recipe(recipe, overrides)
    kind = kind_of(loaded)
    with tempfile.TemporaryDirectory() as scratch:  # a kind that composes its base writes it there
        backbone, notes = _meta(kind.base(loaded, Path(scratch)))
    samples = rows_as_read(loaded)
    evals = {
        source_name(source): len(load_all((source,), loaded.data, seed=loaded.train.seed, wanted=kind.formats))
        for source in loaded.data.eval
    }
    lengths, renderer = None, None
    if backbone.processor is not None:
        renderer = kind.renderer(loaded, backbone.processor)
        if renderer.over_length == "drop" and isinstance(samples, list):
            every = len(samples)
            samples = fitting(samples, renderer, Journal(None, quiet=True), name="train")
            notes.append(f"{every - len(samples)} of {every} training rows are too long and dropped")
        lengths = _lengths(kind, renderer, samples)
    else:
        notes.append("no processor at hand: token lengths are not known, memory is estimated at 512 tokens a row")
    steps, total = plan_steps(loaded, samples, 1)
    weights, sizes = _weight_bytes(loaded, backbone), _sizes(backbone)  # before adapters are put in
    adapted = build_adapters(backbone, loaded.adapter, seed=loaded.train.seed)
    parts, trainable = _trained(adapted, sizes)
    memory, more = _memory(loaded, backbone, weights=weights, trainable=trainable, lengths=lengths)
    return {
        "name": loaded.name,
        "model": {"name": backbone.name, "model_type": backbone.model.config.model_type, "dtype": loaded.model.dtype},
        "parts": parts,
        "targets": adapted.table(),
        "fast": fast_plan(Setting(loaded, adapted, renderer, samples, steps=steps)).table(),
        "data": {"train": len(samples), **evals},
        "tokens": {kind: _percentiles(values) for kind, values in (lengths or {}).items() if kind != "pixels"},
        "steps": {"total": total, "rows_per_step": steps.rows_per_step, "epochs": steps.epoch_at(total)},
        "memory": memory,
        "notes": notes + more,
        "seconds": time.monotonic() - begin,
    }


def _meta(section: ModelSection) -> tuple[Backbone, list[str]]:
    try:
        return meta_backbone(section), []
    except BackboneError:
        kind = section.model_type
        if kind is None or Path(section.name_or_path).exists():
            raise
        note = f"{section.name_or_path} cannot be reached: sizes are the defaults of {kind}, not this checkpoint's"
        model = meta_model(kind)
        if model is None:
            raise
        return Backbone(model, None, find_parts(model), None, section.name_or_path, None, False), [note]


def _lengths(kind: Kind, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
    return kind.measure(renderer, spaced(samples, PROBE_ROWS, renderer))


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    found = np.percentile(values, [50, 90, 99]).astype(int)
    return {"p50": int(found[0]), "p90": int(found[1]), "p99": int(found[2]), "max": int(max(values))}


def _sizes(backbone: Backbone) -> dict[str, int]:
    """Parameters of each part, before adapters are put in."""
    sizes: dict[str, int] = {}
    for name, param in backbone.model.named_parameters():
        part = backbone.parts.part_of(name)
        sizes[part] = sizes.get(part, 0) + param.numel()
    return sizes


def _trained(adapted: Adapted, sizes: Mapping[str, int]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the parts table, trainable parameters: counted on the adapted meta model."""
    trained: dict[str, int] = {}
    for name, param in adapted.trainable().items():
        part = adapted.home(name)[0]
        trained[part] = trained.get(part, 0) + param.numel()
    parts = [{"part": part, "parameters": count, "trainable": trained.get(part, 0)} for part, count in sizes.items()]
    return parts, sum(trained.values())


def _weight_bytes(recipe: Recipe, backbone: Backbone) -> int:
    """Bytes of the base's weights; 4.5 bits a weight for NF4 with its constants."""
    quant, total = recipe.quantization, 0.0
    for name, param in backbone.model.named_parameters():
        packed = backbone.parts.part_of(name) in quant.parts and param.ndim == 2 and "embed" not in name
        size: float = BYTES[recipe.model.dtype]
        if packed and (quant.load_in_4bit or quant.load_in_8bit):
            size = 0.56 if quant.load_in_4bit else 1
        total += param.numel() * size
    return int(total)


def _memory(
    recipe: Recipe, backbone: Backbone, *, weights: int, trainable: int, lengths: dict[str, list[int]] | None
) -> tuple[dict[str, int], list[str]]:
    """Bytes by owner, and a note where the kind of run cannot tell its activations. `process`: interpreter and imports,
    which are this process's own."""
    own = 0 if torch.cuda.is_available() else held_now()
    held = {"process": own, "weights": weights, "trainable": trainable * 8, "optimizer": trainable * 8}
    step = kind_of(recipe).memory(recipe, backbone, trainable=trainable, lengths=lengths)
    notes = [] if step else ["activations are not estimated for this kind of run"]
    found = held | (step or {"activations": 0, "logits": 0})
    return found | {"total": sum(found.values())}, notes


def write_recipe_preview(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    rows: int = 8,
    out: str | Path | None = None,
) -> Path:
    """A page with the first `rows` rows of the training data as the model gets them; returns its path."""
    loaded = load_recipe(recipe, overrides)
    kind, processor = kind_of(loaded), load_processor(loaded.model)
    samples = rows_as_read(loaded)
    path = Path(out) if out is not None else Path(f"{loaded.name}-preview.html")
    kind.preview(loaded, processor, samples, path, rows=rows)
    return path
