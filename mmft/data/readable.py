"""Rows whose media cannot be opened, left out before the first step where the recipe allows bad rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmft.data.formats import Loaded, check_bad
from mmft.data.inspect_rows import Look, inspect_rows
from mmft.journal import Journal
from mmft.recipe.schema import DataSection

_ENOUGH_TO_SHARE = 200
"""Rows, below which processes cost more than they save."""


def readable(loaded: Sequence[Loaded], section: DataSection, *, workers: int, journal: Journal) -> list[Loaded]:
    """The sets without the rows of which a medium cannot be opened; they join the bad ones, counted and listed.

    Only with `max_bad_fraction` above 0: such a row would else stop the run when met. Price: one pass of decoding.
    Raises DataError when more rows are bad than the recipe allows.
    """
    if not section.max_bad_fraction:
        return list(loaded)
    kept = []
    for one in loaded:
        with journal.progress(len(one.samples), f"{one.name}: media opened") as bar:
            count = workers if len(one.samples) > _ENOUGH_TO_SHARE else 0
            seen = inspect_rows(one.samples, Look(section.max_image_pixels), workers=count, progress=bar.update)
        rows = list(zip(one.samples, seen, strict=True))
        broken = [(row.where or row.id, look.unreadable[0]) for row, look in rows if look.unreadable]
        good = [row for row, look in rows if not look.unreadable]
        kept.append(replace(one, samples=good, bad=[*one.bad, *broken]))
        check_bad(kept[-1], section.max_bad_fraction)
    return kept
