"""A guard against forgetting: the R@1 of a probe set, before training and at every evaluation.

When it falls by more than the recipe allows the run warns, or stops with the checkpoint of that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.engine.state import TrainState
from mmft.errors import RecipeError, choices
from mmft.evaluation.pairs import embed_pairs, headline
from mmft.evaluation.retrieval import recall_at_one
from mmft.files import write_json
from mmft.kinds.base import Datasets
from mmft.objectives.contrastive_embed import sides
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder, read_json

RESULT = "probe.json"


class ForgettingGuard:
    """A callback; it must stand before the one that writes metrics, which then holds `probe_r@1`.

    The score before training is kept in the run folder, so that a resumed run falls from the same height. Every rank
    computes it, so all stop together.
    """

    def __init__(self, run: RunFolder, model: nn.Module, datasets: Datasets) -> None:
        fields = run.recipe.objective
        self.name = fields.probe_set or ""
        if self.name not in datasets.evals:
            raise RecipeError(
                f"objective.probe_set names no evaluation set: {self.name}",
                where="objective.probe_set",
                allowed=choices(list(datasets.evals), word=self.name),
                do="give a name of data.eval",
            )
        assert isinstance(datasets.renderer, PairRenderer)
        self.allowed, self.stops = fields.probe_max_drop, fields.probe_action == "stop"
        self.samples: Sequence[Sample] = datasets.evals[self.name]
        self.model, self.renderer, self.run = model, datasets.renderer, run
        self.before = 0.0
        self.fallen_at: int | None = None

    def score(self) -> float:
        """R@1 from the left side (pictures, sounds) to the texts."""
        size = self.run.recipe.evaluate.per_device_eval_batch_size
        found = embed_pairs(self.model, self.renderer, self.samples, batch_size=size)
        return recall_at_one(found.left, found.right, left_groups=found.left_groups, right_groups=found.right_groups)

    def on_start(self, state: TrainState, total_steps: int) -> None:
        """The score before training; a resumed run reads it."""
        known = read_json(self.run.path / RESULT) if state.step else {}
        self.before = known["before"] if known else self.score()
        self.fallen_at = known.get("fallen_at")
        if not known:
            self._write(state.step, self.before)
            self.run.journal.metrics(state.step, **{"probe_r@1": self.before})
        self.run.journal.say(f"probe {self.name}: R@1 {self.before:.3f} before training")

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Nothing."""

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        """The score now, into the metrics; warn or stop when it has fallen too far."""
        now = self.score()
        metrics["probe_r@1"] = now
        fall = self.before - now
        self.run.journal.say(f"step {state.step}: probe {self.name}: R@1 {now:.3f} (before training {self.before:.3f})")
        # Shares of whole rows: a fall of exactly what is allowed must not fail on the last bit.
        if fall > self.allowed + 1e-9:
            self.fallen_at = self.fallen_at or state.step
            text = (
                f"probe {self.name}: R@1 fell from {self.before:.3f} to {now:.3f} at step {state.step}, "
                f"more than objective.probe_max_drop {self.allowed:g}"
            )
            self.run.journal.warn(text)
            self.run.journal.event("forgetting", step=state.step, before=self.before, now=now)
            if self.stops:
                state.stopped = text
        self._write(state.step, now)

    def on_save(self, state: TrainState, folder: Path) -> None:
        """Nothing."""

    def on_end(self, state: TrainState) -> None:
        """Nothing."""

    def _write(self, step: int, now: float) -> None:
        if self.run.journal.rank:
            return
        path = self.run.path / RESULT
        scores = {} if step == 0 else dict(read_json(path).get("scores", {}))
        scores[str(step)] = now
        write_json(
            path,
            {
                "set": self.name,
                "metric": headline(sides(self.model)),
                "before": self.before,
                "last": now,
                "allowed_drop": self.allowed,
                "action": "stop" if self.stops else "warn",
                "fallen_at": self.fallen_at,
                "scores": scores,
            },
        )


def guards(run: RunFolder, model: nn.Module, datasets: Datasets) -> list[ForgettingGuard]:
    """The guard a recipe asks for; none without `objective.probe_set`."""
    return [ForgettingGuard(run, model, datasets)] if _watched(run.recipe) else []


def _watched(recipe: Recipe) -> bool:
    return recipe.objective.probe_set is not None
