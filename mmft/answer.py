"""`mmft generate`: one question about one image, from whatever folder holds a model."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.adapters.store import CONFIG, load_adapter, read_sidecar
from mmft.backbones.load import Backbone, load_backbone
from mmft.data.render import Renderer
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.errors import AdapterError, DataError, RecipeError
from mmft.evaluation.generate import generate_answers
from mmft.files import read_json_file
from mmft.recipe.schema import ModelSection, QuantizationSection
from mmft.runfolder import find_run

MAX_PIXELS = 40_000_000


@dataclass(frozen=True)
class Speaker:
    """A model that can answer, and a word on what it is."""

    model: Any
    backbone: Backbone
    what: str


def answer(
    model: str | Path,
    *,
    question: str,
    image: str | Path | None = None,
    which: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """`{"answer", "model", "which", "seconds"}`.

    `model` is a run folder (`which` picks base, adapter or merged; merged where there is one), an adapter folder, a
    model folder, a hub id or `shipped:nano-vlm`. Raises DataError for a picture that cannot be opened, AdapterError
    for an adapter of another base.
    """
    if not question.strip():
        raise RecipeError("the question is empty", where="--question", do="ask something")
    speaker = find_speaker(str(model), which=which, base=base)
    pieces = [Piece("text", question)]
    media: tuple[MediaRef, ...] = ()
    if image is not None:
        path = Path(image).expanduser()
        if not path.is_file():
            raise DataError(f"there is no image {image}", where="--image", do="check the path")
        pieces.insert(0, Piece("image"))
        media = (MediaRef("image", path=path.name, root=path.resolve().parent),)
    turns = (Turn("user", tuple(pieces)), Turn("assistant", (Piece("text", "?"),)))
    sample = Sample(id="question", turns=turns, media=media, where="command line")
    renderer = Renderer(speaker.backbone.processor, max_length=1_000_000, max_image_pixels=MAX_PIXELS)
    begin = time.monotonic()
    texts = generate_answers(
        speaker.model,
        speaker.backbone.processor,
        renderer,
        [sample],
        batch_size=1,
        max_new_tokens=max_new_tokens,
        device=next(speaker.model.parameters()).device,
    )
    seconds = time.monotonic() - begin
    return {"answer": texts[0], "model": str(model), "which": speaker.what, "seconds": round(seconds, 3)}


def find_speaker(model: str, *, which: str | None, base: str | None) -> Speaker:
    """Load what `model` names. Raises RecipeError when `which` does not apply, BackboneError, AdapterError."""
    folder = Path(model).expanduser()
    if (folder / "recipe.yaml").is_file():
        return _from_run(folder, which)
    if which is not None:
        raise RecipeError(
            f"--which {which} needs a run folder, and {model} is none",
            where="--which",
            allowed="base, adapter or merged of a run folder",
            do="leave --which out",
        )
    if (folder / CONFIG).is_file():
        return _from_adapter(folder, base)
    backbone = load_backbone(ModelSection(name_or_path=model))
    return Speaker(backbone.model, backbone, "model")


def _from_run(folder: Path, which: str | None) -> Speaker:
    run = find_run(folder, quiet=True)
    recipe = run.recipe
    full = recipe.adapter.method == "full"
    there = {"base": True, "adapter": (run.model if full else run.adapter).is_dir(), "merged": run.merged.is_dir()}
    wanted = which or next(name for name in ("merged", "adapter", "base") if there[name])
    if not there.get(wanted):
        raise RecipeError(
            f"the run has no {wanted} model",
            where=f"--which {wanted}",
            allowed=", ".join(name for name, found in there.items() if found),
            do="let the run finish, or choose another",
        )
    if wanted == "merged" or (wanted == "adapter" and full):
        place = run.merged if wanted == "merged" else run.model
        backbone = load_backbone(recipe.model.model_copy(update={"name_or_path": str(place), "revision": None}))
        return Speaker(backbone.model, backbone, wanted)
    backbone = load_backbone(recipe.model, recipe.quantization)
    return Speaker(load_adapter(backbone, run.adapter) if wanted == "adapter" else backbone.model, backbone, wanted)


def _from_adapter(folder: Path, base: str | None) -> Speaker:
    config = read_json_file(folder / CONFIG)
    sidecar = read_sidecar(folder) or {}
    name = base or sidecar.get("base_name") or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(f"{CONFIG} names no base model", where=str(folder), do="give it with --base")
    backbone = load_backbone(ModelSection(name_or_path=name, revision=config.get("revision")), QuantizationSection())
    return Speaker(load_adapter(backbone, folder), backbone, "adapter")
