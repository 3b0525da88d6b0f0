"""All that the loop is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.adapters.build import Adapted
from mmft.data.collate import Batch
from mmft.data.loader import RowRenderer
from mmft.data.order import StepPlan
from mmft.data.sample import Sample
from mmft.objectives.base import Objective
from mmft.recipe.schema import TrainSection


@dataclass(frozen=True)
class TrainJob:
    """All that the loop is given. `identity` names what a resumed run must have in common with this one; `prepare` is
    what a batch on the device goes through last; `sources` name the data sets whose losses are told apart; `recomputed`
    language layers are computed again in the backward pass, where the section does not ask for all."""

    adapted: Adapted
    objective: Objective
    samples: Sequence[Sample]
    eval_samples: Sequence[Sample]
    renderer: RowRenderer
    plan: StepPlan
    total_steps: int
    eval_batch_size: int
    section: TrainSection
    folder: Path
    identity: dict[str, Any]
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    sources: tuple[str, ...] = ()
    recomputed: int = 0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"
