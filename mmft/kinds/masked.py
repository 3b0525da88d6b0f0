"""Runs that fill in hidden words of texts with pictures."""

from __future__ import annotations

from typing import Any

from mmft.adapters.build import Adapted
from mmft.data.loader import RowRenderer
from mmft.data.masked import MaskedRenderer
from mmft.evaluation.masked import masked_rows, score_masked
from mmft.files import write_json
from mmft.kinds.base import Datasets, models
from mmft.kinds.pairs import Pairs
from mmft.objectives.base import Objective
from mmft.objectives.mlm import FLAVA, MaskedObjective, check_masked
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder, read_json

RESULT = "masked.json"


class Masked(Pairs):
    """`mlm`: pairs, one text of a picture at a time."""

    objectives = ("mlm",)
    rows_wanted = "pairs (image and caption)"
    least_rows = 1

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`MaskedRenderer`."""
        return MaskedRenderer(
            processor,
            max_length=recipe.data.max_length,
            over_length=recipe.data.over_length,
            max_image_pixels=recipe.data.max_image_pixels,
            seed=recipe.train.seed,
        )

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """As it is: there is no scale to train."""
        return adapted

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """Cross-entropy of the hidden tokens."""
        return MaskedObjective(adapted.model)

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, Any]]:
        """Evaluation rows (training rows where there are none) with their words hidden, a batch each."""
        if check_masked(adapted.model) == FLAVA:  # its output holds several logits, none of that name
            return []
        samples = datasets.shown(run.recipe.export.verify_rows)
        assert isinstance(datasets.renderer, MaskedRenderer)
        batches = [datasets.renderer.assemble([(sample, 0)]) for sample in samples]
        return [{**batch.inputs, "labels": batch.labels} for batch in batches]

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """Nothing beside the logits of the proof rows."""
        return {}

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Hidden words of every model on every set, written to `masked.json`."""
        assert isinstance(datasets.renderer, MaskedRenderer)
        found = {}
        size, total = run.recipe.evaluate.per_device_eval_batch_size, sum(map(len, datasets.evals.values()))
        for which, model, _ in models(run, adapted, self.base(run.recipe, run.path)):
            with run.journal.progress(total, f"hidden words of {which}") as bar:
                found[which] = {
                    name: masked_rows(model, datasets.renderer, samples, batch_size=size, progress=bar.update)
                    for name, samples in datasets.evals.items()
                }
        resamples, seed = run.recipe.evaluate.bootstrap_samples, run.recipe.train.seed
        write_json(run.path / RESULT, score_masked(found, bootstrap_samples=resamples, seed=seed))

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """What `evaluate` wrote; empty before that."""
        return read_json(run.path / RESULT)
