"""The steps of a run as its recipe tells them: batch sizes, the mixture of sets, rows that keep together."""

from __future__ import annotations

from collections.abc import Sequence

from mmft.data.formats import source_name
from mmft.data.mixture import mixture_of
from mmft.data.order import StepPlan, Together
from mmft.data.packing import shown_alike
from mmft.data.sample import Sample
from mmft.data.stream_order import StreamPlan
from mmft.data.streaming import Streamed
from mmft.errors import RecipeError
from mmft.recipe.schema import Recipe


def plan_steps(recipe: Recipe, samples: Sequence[Sample], world: int) -> tuple[StepPlan, int]:
    """Rows of every step in the recipe's mixture of sets, and how many steps.

    Raises RecipeError when the batch does not divide over the processes.
    """
    section = recipe.train
    micro = section.per_device_train_batch_size
    if section.effective_batch_size is None:
        per_step = section.gradient_accumulation_steps * world
    else:
        per_step = section.effective_batch_size // micro
        if section.effective_batch_size % (micro * world):
            raise RecipeError(
                f"train.effective_batch_size {section.effective_batch_size} does not divide into {world} processes "
                f"of per_device_train_batch_size {micro}",
                where="train.effective_batch_size",
                allowed=f"a multiple of {micro * world}",
                do="change one of the three numbers",
            )
    if isinstance(samples, Streamed):
        stream = StreamPlan(
            sum(samples.draws), micro, per_step, world, section.seed, sets=samples.sets, draws=samples.draws
        )
        return stream, section.max_steps or stream.steps_for(section.num_train_epochs)
    sets = recipe.data.train
    mixture = mixture_of(samples, sets, [source_name(one) for one in sets], temperature=recipe.data.temperature)
    rows = len(samples) if mixture is None else mixture.rows
    together = None
    if section.train_sampling_strategy == "group_by_media":
        together = Together(shown_alike([sample.media for sample in samples]))
    plan = StepPlan(rows, micro, per_step, world, section.seed, mixture, together)
    return plan, section.max_steps or plan.steps_for(section.num_train_epochs)
