"""Training sets as they are read, with the streamed ones as their objective learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mmft.data.formats import load_all
from mmft.data.loader import RowRenderer, near
from mmft.data.sample import Sample
from mmft.data.stream_files import Fetch
from mmft.data.streaming import Streamed, open_streams
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.recipe.schema import Recipe


def rows_as_read(recipe: Recipe) -> Sequence[Sample]:
    """The training rows without a look at their lengths and media, to plan and to show; streamed ones as they come."""
    kind, data = kind_of(recipe), recipe.data
    plain = [source for source in data.train if not source.streaming]
    held = kind.samples(recipe, load_all(plain, data, seed=recipe.train.seed, wanted=kind.formats))
    if len(plain) == len(data.train):
        return held
    return opened_streams(recipe, held, Journal(None, quiet=True))


def opened_streams(recipe: Recipe, held: Sequence[Sample], journal: Journal, *, fetch: Fetch | None = None) -> Streamed:
    """The training sets, some of them streamed, as the recipe's objective learns from them."""
    kind = kind_of(recipe)
    return open_streams(
        recipe.data,
        held,
        wanted=kind.formats,
        journal=journal,
        fetch=fetch,
        learned=partial(kind.streamed, recipe),
        described=partial(kind.columns, recipe),
    )


def spaced(samples: Sequence[Sample], count: int, renderer: RowRenderer) -> Sequence[Sample]:
    """About `count` rows, evenly spaced; of streamed sets the first good ones."""
    if isinstance(samples, Streamed):
        return near(samples, count, renderer)
    return samples[:: max(1, len(samples) // count)][:count]
