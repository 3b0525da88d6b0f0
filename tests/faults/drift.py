"""F18: what changed between the start and the resume of a run is refused with its name and both values."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, at_step, expect, finish, recipe, run_of, shelf, train


def _rows(place: Path) -> None:
    path = place / "shelf" / "rows" / "rows.jsonl"
    path.write_text(path.read_text().replace("Which colour?", "Which colour!", 1))


def _image(place: Path) -> None:
    path = sorted((place / "shelf" / "rows").glob("*.png"))[3]
    other = sorted((place / "shelf" / "rows").glob("*.png"))[4]
    path.write_bytes(other.read_bytes())


def _processor(place: Path) -> None:
    path = place / "shelf" / "model" / "processor_config.json"
    if not path.is_file():
        path = place / "shelf" / "model" / "preprocessor_config.json"
    text = path.read_text()
    changed = re.sub(r'("image_mean": \[\s*)0\.4', r"\g<1>0.5", text)
    expect(changed != text, "the processor's config has no image_mean")
    path.write_text(changed)


def _weight(place: Path) -> None:
    path = place / "shelf" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def _another_torch() -> None:
    import torch

    torch.__version__ = type(torch.__version__)("9.9.9")


CASES: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], Callable[[], None] | None, str]] = {
    "a byte of the data": (_rows, {}, None, "data: "),
    "an image": (_image, {}, None, "data: "),
    "the processor": (_processor, {}, None, "processor_config.json: |preprocessor_config.json: "),
    "a base weight": (_weight, {}, None, "base file model.safetensors: "),
    "the learning rate": (None, {"train.learning_rate": 2e-2}, None, "train.learning_rate: "),
    "another torch": (None, {}, _another_torch, "torch: "),
}


def drift(tally: Tally, count: int) -> None:
    """Six changes are refused with name and both values; two that change no number are accepted."""
    shelf(tally.folder)
    for name, (change, fields, prepare, field) in list(CASES.items())[:count]:
        with tally.trial(name):
            place = _begun(tally)
            if change is not None:
                change(place)
            values = _values(tally, place, fields)
            (place / "recipe.yaml").unlink()
            code = finish(train(values, place, resume=True, prepare=prepare), place / "log2")
            text = " ".join((place / "log2").read_text().split())
            expect(code in (2, 4), f"exit {code}: {text[-600:]}")
            expect(re.search(rf"({field})\S+ → \S+", text) is not None, f"no field with both values: {text[-700:]}")
            expect(not (run_of(place) / "adapter").exists(), "it trained on")
    for name, fields in (
        ("logging_steps", {"train.logging_steps": 3}),
        ("save_total_limit", {"train.save_total_limit": 5}),
    ):
        with tally.trial(f"{name} may change"):
            place = _begun(tally)
            (place / "recipe.yaml").unlink()
            code = finish(train(_values(tally, place, fields), place, resume=True), place / "log2")
            expect(code == 0, f"exit {code}: {(place / 'log2').read_text()[-600:]}")


def _values(tally: Tally, place: Path, fields: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(recipe(tally, {"train.max_steps": 6, **fields}))
    return json.loads(text.replace(str(tally.folder / "shelf"), str(place / "shelf")))


def _begun(tally: Tally) -> Path:
    """A run that was told to stop after step 3, on a model and rows of its own."""
    place = tally.place("run")
    shutil.copytree(tally.folder / "shelf", place / "shelf")
    stop = at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code = finish(train(_values(tally, place, {}), place, prepare=stop), place / "log")
    expect(code == 143, f"exit {code}: {(place / 'log').read_text()[-600:]}")
    return place


FAULTS = (Fault("F18", "base, data, image, processor, recipe or torch changed", 8, 8, "", drift),)
MUTANTS = (
    (
        "F18",
        "mmft/data/audit.py",
        "media = [content(ref) for ref in sample.media]",
        "media = [ref.path for ref in sample.media]",
    ),
)
