"""`mmft trace`: one row's way through the ten stations, with type, shape, digest and source line of each."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted, build_adapters, set_modes
from mmft.adapters.store import save_adapter
from mmft.backbones.load import load_backbone
from mmft.data.audit import fingerprint
from mmft.data.collate import Batch, collate
from mmft.data.formats import load_all
from mmft.data.loader import assemble
from mmft.data.media import open_image
from mmft.data.order import StepPlan
from mmft.data.packing import pack
from mmft.data.render import IGNORED, Renderer
from mmft.data.sounds import open_audio
from mmft.data.steps import plan_steps
from mmft.engine.loop import Engine
from mmft.errors import RecipeError
from mmft.export.merge import merge_adapter
from mmft.fast.packing import positions_of
from mmft.fast.shown import step_lines, told
from mmft.kinds import kind_of
from mmft.kinds.base import Datasets
from mmft.kinds.streams import rows_as_read
from mmft.objectives.base import Objective
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import Recipe

Station = dict[str, Any]


def trace_row(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, row: int = 0) -> list[Station]:
    """One entry per station: `station`, `what` (type and a word on the value), `shape`, `digest`, `code` (file:line).

    Loads the backbone and does one forward and backward of the row; nothing is written. Raises RecipeError when there
    is no such row.
    """
    loaded = load_recipe(recipe, overrides)
    kind = kind_of(loaded)
    samples = rows_as_read(loaded)
    if not 0 <= row < len(samples):
        raise RecipeError(
            f"row {row} does not exist",
            where="--row",
            allowed=f"0 to {len(samples) - 1}",
            do="choose a row of the training data",
        )
    with tempfile.TemporaryDirectory() as scratch:  # a kind that composes its base writes it there
        backbone = load_backbone(kind.base(loaded, Path(scratch)), loaded.quantization)
    adapted = kind.adapt(build_adapters(backbone, loaded.adapter, seed=loaded.train.seed), loaded)
    datasets = Datasets(samples, {}, kind.renderer(loaded, backbone.processor), fingerprint="")
    # A loss that compares rows needs more than one.
    rows = [samples[(row + more) % len(samples)] for more in range(kind.least_rows)]
    alone = dataclasses.replace(datasets, train=rows)
    objective = kind.objective(loaded, adapted, alone)  # it may tell the renderer how the model wants its rows
    pad = 0 if hasattr(datasets.renderer, "assemble") else backbone.pad_token_id
    batch = assemble(datasets.renderer, [(one, 0) for one in rows], pad_token_id=pad)
    return [
        *_data_stations(loaded, datasets, batch, row=row),
        *_pack_stations(loaded, adapted, datasets, row=row),
        *_model_stations(loaded, adapted, objective, batch),
    ]


def _data_stations(recipe: Recipe, datasets: Datasets, batch: Batch, *, row: int) -> list[Station]:
    samples, renderer = datasets.train, datasets.renderer
    sample = samples[row].at(0)
    plan, total = plan_steps(recipe, samples, 1)
    step = next((s for s in range(total) if any(seen == row for seen, _ in plan.step_rows(s))), None)
    turns = f"{len(sample.turns)} turns, {len(sample.media)} media"
    pictures = [open_image(ref, max_pixels=recipe.data.max_image_pixels) for ref in sample.media if ref.kind == "image"]
    rate = getattr(getattr(renderer, "feature_extractor", None), "sampling_rate", 16000)
    sounds = [open_audio(ref, sampling_rate=rate) for ref in sample.media if ref.kind == "audio"]
    rendered: list[Station] = []
    if isinstance(renderer, Renderer):
        row_alone = renderer.render(sample)
        supervised = int((row_alone.labels != IGNORED).sum())
        rendered = [
            _station(
                "5 render",
                renderer.render,
                what=f"Rendered, {row_alone.media_tokens} image tokens, {supervised} supervised",
                shape=str(tuple(row_alone.input_ids.shape)),
                value=torch.stack([row_alone.input_ids, row_alone.labels]),
            )
        ]
    mark = fingerprint([sample])
    gather = collate if isinstance(renderer, Renderer) else renderer.assemble
    return [
        _station("1 formats", load_all, what=f"Sample {sample.id} ({sample.where})", shape=turns, value=sample),
        _station("2 audit", fingerprint, what="fingerprint", shape="1 row", value=mark),
        _station("3 order", StepPlan.micro_batches, what=f"seen in step {step}", shape=f"of {total} steps", value=step),
        *(
            _station("4 media", open_image, what=f"{image.mode} image", shape=str(image.size), value=image.tobytes())
            for image in pictures
        ),
        *(
            _station("4 media", open_audio, what=f"sound at {rate} Hz", shape=str(sound.shape), value=sound.tobytes())
            for sound in sounds
        ),
        *rendered,
        *(
            _station("6 collate", gather, what=f"Batch.{key} {value.dtype}", shape=str(tuple(value.shape)), value=value)
            for key, value in batch.inputs.items()
        ),
    ]


def _pack_stations(recipe: Recipe, adapted: Adapted, datasets: Datasets, *, row: int) -> list[Station]:
    """The line that the row stands in, in the step that sees it first."""
    plan, total = plan_steps(recipe, datasets.train, 1)
    step = next((s for s in range(total) if any(seen == row for seen, _ in plan.step_rows(s))), 0)
    positions = positions_of(adapted.backbone.model)
    lines = step_lines(recipe, datasets.renderer, datasets.train, plan, step=step, positions=positions)
    own = next((line for line in lines if datasets.train[row].id in line.ids), None)
    if own is None:
        return []
    facts, forwards = told(own), f"{len(lines)} forward{'s' if len(lines) > 1 else ''}"
    what = f"step {step}: {plan.rows_per_step} rows in {forwards}; this one {len(facts['ids'])} rows"
    shape = f"{facts['tokens']} tokens of {facts['alone']}"
    return [_station("6 pack", pack, what=what, shape=shape, value=own.inputs["attention_mask"])]


def _model_stations(recipe: Recipe, adapted: Adapted, objective: Objective, batch: Batch) -> list[Station]:
    set_modes(adapted)
    torch.manual_seed(recipe.train.seed)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.train.bf16):
        loss = objective.loss(adapted.model, batch)
    (loss.sum / max(loss.count, 1)).backward()
    norms: dict[str, float] = {}
    params = adapted.trainable()
    for group in adapted.groups:
        gradients = [grad for name in group.names if (grad := params[name].grad) is not None]
        square = sum((float(grad.norm()) ** 2 for grad in gradients), 0.0)
        norms[group.part] = norms.get(group.part, 0.0) + square
    shown = ", ".join(f"{part} {square**0.5:.3g}" for part, square in sorted(norms.items()))
    frozen = sum(1 for param in adapted.model.parameters() if not param.requires_grad and param.grad is not None)
    count = sum(param.numel() for param in adapted.trainable().values())
    mean = float(loss.sum.detach()) / max(loss.count, 1)
    return [
        _station("7 objective", objective.loss, what=f"Loss {mean:.4f}", shape=f"count {loss.count}", value=loss.sum),
        _station(
            "8 loop", Engine.fit, what=f"gradient norms: {shown}", shape=f"{frozen} frozen with gradient", value=norms
        ),
        _station(
            "9 store", save_adapter, what=f"{len(adapted.trainable())} tensors", shape=f"{count:,} values", value=count
        ),
        _station(
            "10 merge",
            merge_adapter,
            what="W + s·BA",
            shape=f"{sum(len(t.modules) for t in adapted.targets)} modules",
            value=[target.modules for target in adapted.targets],
        ),
    ]


def _station(name: str, code: Callable[..., Any], *, what: str, shape: str, value: object) -> Station:
    return {"station": name, "what": what, "shape": shape, "digest": _digest(value), "code": _code(code)}


def _digest(value: object) -> str:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        data = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def _code(function: Callable[..., Any]) -> str:
    file = Path(inspect.getsourcefile(function) or "?")
    return f"mmft/{'/'.join(file.parts[-2:])}:{inspect.getsourcelines(function)[1]}"
