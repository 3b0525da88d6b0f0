"""What a run does for its objective, station by station of the story; `stages`, `outcome` and `planning` ask it.

A new kind is one file: a subclass with the stations that differ, entered in `mmft/kinds/__init__.py`.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState

from mmft.adapters.build import Adapted
from mmft.backbones.load import Backbone, load_backbone
from mmft.data.formats import Loaded
from mmft.data.loader import RowRenderer, near
from mmft.data.sample import Sample
from mmft.data.tables import Columns
from mmft.engine.callbacks import Callback
from mmft.errors import BackboneError, DataError, RecipeError
from mmft.objectives.base import Objective
from mmft.recipe.schema import ModelSection, Recipe
from mmft.runfolder import RunFolder

PATIENCE = 3600
"""Seconds that other ranks wait for what rank 0 makes."""


@dataclass(frozen=True)
class Datasets:
    """Training rows and, by name, the evaluation sets; the renderer that both go through. `rewards` are functions of
    the user's own that judge sampled answers."""

    train: Sequence[Sample]
    evals: dict[str, list[Sample]]
    renderer: RowRenderer
    fingerprint: str
    rewards: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)

    def shown(self, count: int) -> list[Sample]:
        """The first rows that are held out, or where there are none those of training."""
        return near(next(iter(self.evals.values()), self.train), count, self.renderer)


class Kind(ABC):
    """One kind of run; it holds no state."""

    objectives: ClassVar[tuple[str, ...]]
    """The values of `objective.name` it serves."""
    formats: ClassVar[tuple[str, ...]]
    """Layouts of rows (`data.train[].format`) it learns from."""
    rows_wanted: ClassVar[str]
    """The same in words, for an error."""
    least_rows: ClassVar[int] = 1
    """Rows that a loss needs; `mmft trace` takes that many."""

    # -- before training --------------------------------------------------------------------------------------------

    def base(self, recipe: Recipe, folder: Path) -> ModelSection:
        """Where the base model is loaded from. A kind that composes its base writes it below `folder` (the run folder)
        first; asked again, for a resumed or finished run, it gives the same."""
        return recipe.model

    @abstractmethod
    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """What makes batches of rows. Raises DataError for a processor that cannot."""

    def samples(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """The rows of one set as they are learned from; by default as they were read."""
        return samples

    def streamed(self, recipe: Recipe, rows: Callable[[int], Sample], number: int, count: int) -> Sample:
        """The row of a number of a streamed set (`rows`, `count` of them) as it is learned from, without a look at all
        rows. Raises DataError for one of which nothing, or more than one row, would become."""
        return rows(number)

    def columns(self, recipe: Recipe, rows: Sequence[Mapping[str, Any]], declared: Mapping[str, str]) -> Columns:
        """The columns of a streamed table, of which only the first `rows` are there; `declared` by the recipe."""
        raise RecipeError(f"a run of {recipe.objective.name} reads no tables", where="data.train[].format")

    def balanced(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """The training rows as an epoch sees them, some of them perhaps repeated; by default each once."""
        return samples

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """The adapted model with what else the objective trains, for example a temperature or a head."""
        return adapted

    @abstractmethod
    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """What is minimised. Raises BackboneError for a model that it does not fit."""

    def calibration(self, recipe: Recipe, backbone: Backbone, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Training batches that a data-driven start (EVA) looks at."""
        raise RecipeError(
            f"init_lora_weights: eva has no batches to look at in a run of {recipe.objective.name}",
            where="adapter.init_lora_weights",
            do="choose another start",
        )

    def settle(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> None:
        """What is fitted when training is over, before the model is kept; nothing by default."""
        return None

    def watchers(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[Callback]:
        """Callbacks that watch training, called before the one that writes metrics, so they may add to them."""
        return []

    # -- after training ---------------------------------------------------------------------------------------------

    def keep(self, recipe: Recipe, adapted: Adapted, folder: Path) -> None:
        """Add to the adapter folder what was trained beside the adapter; the merge reads it from there."""
        return None

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Inputs (with labels) on which the logits of merged and adapter model are compared; none by default."""
        return []

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """Further entries of the merge's proof. Raises ExportError when the merged model is not what was trained."""
        return {}

    @abstractmethod
    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Run `models(...)` on `datasets.evals` and write what `scores` and the report read; the sets are not empty."""

    @abstractmethod
    def scores(self, run: RunFolder) -> dict[str, Any]:
        """This kind's part of report.json (`headline`, `scores`, `sets`), {} where nothing was evaluated."""

    # -- without training -------------------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Sizes of some rows for `mmft plan`: kind of token -> one number a row, `all` among them."""

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """Estimated bytes of `activations` and `logits` in a step; None where the kind cannot tell."""
        return None

    def preview(self, recipe: Recipe, processor: Any, samples: Sequence[Sample], path: Path, *, rows: int) -> None:
        """Write a page that shows rows as the model gets them. Raises RecipeError where the kind has none."""
        raise RecipeError(
            f"a run of {recipe.objective.name} has no preview",
            where="objective.name",
            do="run mmft plan, which counts the rows, or mmft trace, which follows one",
        )


def check_formats(kind: Kind, recipe: Recipe, sets: Sequence[Loaded]) -> None:
    """Raise DataError for rows of another kind than the objective learns from."""
    for one in sets:
        if one.format not in kind.formats:
            raise DataError(
                f"the rows of '{one.name}' are {one.format}, and objective.name is {recipe.objective.name}",
                where=one.samples[0].where if one.samples else one.name,
                allowed=kind.rows_wanted,
                do="change objective.name, or set data.train[].format",
            )


def wait_for_rank_0(is_made: Callable[[], bool], make: Callable[[], None], *, where: Path) -> None:
    """Have rank 0 make something that all ranks read, unless it is there (under torch.distributed transformers saves on
    rank 0 alone). The others wait without a collective, because after training rank 0 asks again alone.

    Raises BackboneError when it is not there after an hour.
    """
    begin = time.monotonic()
    while not is_made():
        if PartialState().is_main_process:
            make()
        elif time.monotonic() - begin > PATIENCE:
            raise BackboneError(f"rank 0 has not made it in {PATIENCE} s", where=str(where), do="look at its log")
        else:
            time.sleep(0.2)


def folder_section(section: ModelSection, folder: Path) -> ModelSection:
    """The model section of a recipe, for a folder that stands in for its base."""
    return section.model_copy(update={"name_or_path": str(folder), "revision": None})


def models(run: RunFolder, adapted: Adapted, base: ModelSection) -> Iterator[tuple[str, Any, Backbone]]:
    """(name, model, backbone) of each model the recipe compares; at most one beside the trained one is in memory.

    Base and adapter are the loaded model with the adapter off and on; the merged model is read back from its folder.
    """
    recipe = run.recipe
    for which in recipe.evaluate.models:
        if which == "adapter":
            yield which, adapted.model, adapted.backbone
        elif which == "base" and adapted.switches:
            with adapted.model.disable_adapter():
                yield which, adapted.model, adapted.backbone
        elif which != "merged" or run.merged.is_dir():
            section = base if which == "base" else folder_section(base, run.merged)
            bits = recipe.quantization if which == "base" else None
            other = load_backbone(section, bits, device=next(adapted.model.parameters()).device)
            yield which, other.model, other
            del other
            gc.collect()
