"""The packs of a step as `mmft trace` and `mmft preview` show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmft.data.collate import Batch
from mmft.data.loader import RowRenderer
from mmft.data.order import StepPlan
from mmft.data.packing import PackedRenderer, PackPlan, Positions, plain_positions, row_sizes
from mmft.data.render import Renderer
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.fast.packing import by_recipe
from mmft.recipe.schema import Recipe

MEASURED = 2000
"""Rows, evenly spaced, among which the longest is looked for; a run measures all."""


def step_lines(
    recipe: Recipe,
    renderer: RowRenderer,
    samples: Sequence[Sample],
    plan: StepPlan,
    *,
    step: int = 0,
    positions: Positions = plain_positions,
) -> list[Batch]:
    """The forwards of a step as lines of rows, rendered; none where the recipe does not pack. Whether the model can is
    proven when the run starts."""
    if not isinstance(renderer, Renderer) or isinstance(samples, Streamed) or by_recipe(recipe, renderer):
        return []
    rows = plan.step_rows(step)
    spaced = range(0, len(samples), max(1, len(samples) // MEASURED))
    sizes = row_sizes(renderer, samples, only=sorted({*spaced, *(row for row, _ in rows)}))
    share = recipe.train.fast is True or (recipe.train.fast is not False and "shared_prefix" in recipe.train.fast)
    packed = PackedRenderer(renderer, positions, share=share)
    packs = PackPlan.of(plan, sizes, layout="packs", share=share).packs(step)
    return [packed.assemble([(samples[row], epoch) for row, epoch in one]) for one in packs]


def told(batch: Batch) -> dict[str, Any]:
    """A line in words: its rows, its tokens, those of the rows alone, beginnings that are computed once."""
    table = batch.inputs["attention_mask"][0, 0].tolist()
    shared = sorted({(row[2], row[3]) for row in table if row[3]})
    return {
        "ids": batch.ids,
        "tokens": batch.labels.shape[1],
        "alone": batch.tokens,
        "shared": [
            {"tokens": end - start, "rows": sum(row[2:] == [start, end] for row in table)} for start, end in shared
        ],
    }
