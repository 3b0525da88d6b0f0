"""Rows of a stream that were bad when a step met them: told, counted, and no more than the recipe allows."""

from __future__ import annotations

from collections.abc import Sequence

from mmft.data.collate import Batch
from mmft.data.streaming import Streamed
from mmft.engine.guards import everywhere
from mmft.engine.job import TrainJob
from mmft.engine.state import TrainState
from mmft.errors import DataError
from mmft.journal import Journal

_TOLD = 5


def tell_left_out(
    job: TrainJob, stream: Streamed, state: TrainState, micros: Sequence[Batch], *, journal: Journal
) -> None:
    """Count and tell the rows that the step just done went without; every rank must call it.

    Raises DataError when more were bad than `max_bad_fraction` of the rows of a pass (of those met, after the first).
    """
    found = [(text, bad) for batch in micros for text, bad in batch.left_out]
    bad = everywhere([text for text, counts in found if counts])
    long = everywhere([text for text, counts in found if not counts])
    for kind, rows in (("bad_rows", bad), ("long_rows", long)):
        if rows:
            journal.event(kind, step=state.step, rows=rows)
    if bad:
        journal.warn(f"step {state.step}: {len(bad)} bad rows left out ({'; '.join(bad[:_TOLD])})")
    state.bad_rows += len(bad)
    met = max(job.plan.rows, state.step * job.plan.rows_per_step)
    if state.bad_rows > stream.bad_allowed * met:
        raise DataError(
            f"{state.bad_rows} bad rows were met, the last: {bad[-1]}",
            where=f"step {state.step}",
            allowed=f"a share of at most {stream.bad_allowed:g} (data.max_bad_fraction) of {met} rows",
            do="mend the rows (events.jsonl lists them), or raise data.max_bad_fraction",
        )
