"""Random changes of pictures: pure functions of (seed, epoch, row, place) that keep a picture's size."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

import mmft
from mmft.data.augment import Augmentation
from mmft.data.loader import batches
from mmft.data.media import open_image
from mmft.data.order import StepPlan
from mmft.data.render import Renderer
from mmft.data.sample import Cell, Sample
from mmft.errors import RecipeError
from mmft.recipe.augmentation import CHANGES
from tests.data.small import processor, sample
from tests.runs import TRAIN_ONLY, adapter_sha, stable, wait_for_step, write_recipe

torch.set_num_threads(1)
ALL = {
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "crop": 0.5,
    "rotate": 20.0,
    "color": 0.4,
    "grayscale": 0.3,
    "blur": 1.0,
}


def changed(row: Sample, strengths: dict[str, float], *, seed: int = 0) -> Sample:
    return dataclasses.replace(row, augment=Augmentation.of(strengths, seed=seed))


def pictures(row: Sample, epoch: int) -> list[np.ndarray]:
    return [np.asarray(open_image(ref, max_pixels=10**6)) for ref in row.at(epoch).media]


def test_the_names_are_those_of_the_recipe():
    assert ALL.keys() == CHANGES.keys()


@pytest.mark.parametrize("name", [*ALL, "all"])
def test_a_change_is_a_pure_function_that_keeps_the_size(name):
    row = sample("What?", "this", images=2, seed=3, id="a")
    marked = changed(row, ALL if name == "all" else {name: ALL[name]})
    plain, before = pictures(row, 0), torch.get_rng_state()
    epochs = [pictures(marked, epoch) for epoch in range(24)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(np.array_equal(a, b) for a, b in zip(pictures(marked, 7), epochs[7], strict=True))
    assert all(one.shape == old.shape for found in epochs for one, old in zip(found, plain, strict=True))
    assert any(not np.array_equal(found[0], plain[0]) for found in epochs)
    assert len({found[1].tobytes() for found in epochs}) > 1
    other = changed(row, ALL if name == "all" else {name: ALL[name]}, seed=1)
    assert any(not np.array_equal(pictures(other, epoch)[0], epochs[epoch][0]) for epoch in range(24))


def test_flips_are_torchvisions():
    row = sample("What?", "this", images=1, id="a")
    (plain,) = pictures(row, 0)
    (flipped,) = pictures(changed(row, {"horizontal_flip": 1.0}), 5)
    assert np.array_equal(flipped, np.asarray(functional.hflip(Image.fromarray(plain))))


def test_places_and_rows_draw_apart():
    twice = changed(dataclasses.replace(row := sample("W?", "x", images=1, id="a"), media=row.media * 2), ALL)
    assert any(len({one.tobytes() for one in pictures(twice, epoch)}) == 2 for epoch in range(4))
    named = changed(dataclasses.replace(row, id="b"), ALL)
    assert any(not np.array_equal(pictures(named, e)[0], pictures(twice, e)[0]) for e in range(4))


def test_a_rows_cells_carry_the_same_change():
    row = sample("W?", "x", images=1, id="a")
    cells = {"photo": Cell("image", row.media[0]), "age": Cell("numeric", 3.0)}
    found = changed(dataclasses.replace(row, cells=cells), ALL).at(2)
    assert found.cells["photo"].value is found.media[0] and found.media[0].drawn is not None
    assert found.cells["age"].value == 3.0


def test_rows_without_changes_are_themselves():
    row = sample("W?", "x", images=1, id="a")
    assert row.at(3) is row and Augmentation.of({"crop": 0.0}, seed=0) is None


def test_workers_and_late_starts_see_the_same_pictures():
    rows = [changed(sample(f"W {k}?", "x", images=1, seed=k, id=f"r{k}"), ALL) for k in range(5)]
    renderer = Renderer(processor("llava"), max_length=4096)

    def run(start: int = 0, workers: int = 0) -> Iterator[torch.Tensor]:
        plan = StepPlan(rows=5, micro_batch=2, micro_per_step=1, seed=4)
        for step in batches(
            rows, renderer, plan, start_step=start, stop_step=6, rank=0, workers=workers, pad_token_id=0
        ):
            yield step[0].inputs["pixel_values"]

    plain = list(run())
    assert all(torch.equal(a, b) for a, b in zip(plain, run(workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[3:], run(start=3), strict=True))


def test_a_killed_run_with_changes_resumes_byte_by_byte(tmp_path: Path):
    """The adapter equals the uninterrupted run's, and differs from one without changes."""
    options = {**TRAIN_ONLY, "data.augmentation": ALL, "train.max_steps": 24}
    plain, whole, cut = (tmp_path / name for name in ("plain", "whole", "cut"))
    mmft.train(write_recipe(plain, {**options, "data.augmentation": {}}), quiet=True)
    mmft.train(write_recipe(whole, options), quiet=True)
    recipe = write_recipe(cut, options)
    pid = stable().start("train", recipe, "--quiet", log=tmp_path / "log")
    wait_for_step(cut / "runs" / "tiny", 7)
    os.kill(pid, signal.SIGKILL)
    assert stable().wait(pid) == -signal.SIGKILL
    assert not (cut / "runs" / "tiny" / "adapter").exists()
    mmft.train(recipe, resume=True, quiet=True)
    shas = [adapter_sha(folder / "runs" / "tiny") for folder in (plain, whole, cut)]
    assert shas[1] == shas[2] != shas[0]


@pytest.mark.parametrize(
    ("given", "words"), [({"flip": 1.0}, "no such change"), ({"crop": 2.0}, "crop: 2 is out of range")]
)
def test_a_wrong_change_is_refused(tmp_path: Path, given: dict[str, float], words: str):
    with pytest.raises(RecipeError, match=words) as caught:
        mmft.validate(write_recipe(tmp_path, {"data.augmentation": given}))
    assert "recipe.yaml:" in str(caught.value)
