"""Batches of each optimizer step, rendered in this process or in workers; the same tensors either way."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmft.data.collate import Batch, Side, collate
from mmft.data.order import MicroBatch, StepPlan
from mmft.data.render import IGNORED, OverLength, Rendered, Renderer, TooLongError
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.errors import DataError, MemoryLimitError, MmftError

PREFETCH = 2
HANG_SECONDS = 600.0


class Assembler(Protocol):
    """A renderer that puts whole batches together itself; it is copied to loader workers."""

    max_length: int
    over_length: OverLength

    def length(self, sample: Sample) -> int:
        """Tokens of a row, without opening its media."""
        ...

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """The batch of (sample, epoch) rows, the same for the same rows. Raises DataError naming a bad row."""
        ...


RowRenderer = Renderer | Assembler


def assemble(
    renderer: RowRenderer, rows: Sequence[tuple[Sample, int]], *, pad_token_id: int, side: Side = "right"
) -> Batch:
    """One batch of (sample, epoch) rows: rendered and padded, or as their renderer puts them together."""
    if not isinstance(renderer, Renderer):
        return renderer.assemble([(sample.at(epoch), epoch) for sample, epoch in rows])
    return collate([renderer.render(sample.at(epoch)) for sample, epoch in rows], pad_token_id=pad_token_id, side=side)


class _MicroBatches(Dataset):
    """The rank's micro-batches; an item is a Batch, None for one without rows, or the MmftError that its making raised
    (a plain value, so that it crosses the process wall as itself and not as torch's traceback text)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        renderer: RowRenderer,
        work: Sequence[MicroBatch],
        pad_token_id: int,
        side: Side,
    ) -> None:
        self._samples, self._renderer, self._work = samples, renderer, work
        self._pad_token_id = pad_token_id
        self._side: Side = side

    def __len__(self) -> int:
        return len(self._work)

    def __getitem__(self, index: int) -> Batch | MmftError | None:
        try:
            if isinstance(self._samples, Streamed):
                if isinstance(self._renderer, Renderer):
                    return self._of_stream(self._samples, self._renderer, self._work[index].rows)
                return _whole_of_stream(self._samples, self._renderer, self._work[index].rows)
            rows = [(self._samples[row], epoch) for row, epoch in self._work[index].rows]
            if not rows:
                return None
            return assemble(self._renderer, rows, pad_token_id=self._pad_token_id, side=self._side)
        except MmftError as error:
            return error
        except MemoryError:
            where = f"samples {', '.join(self._samples[row].id for row, _ in self._work[index].rows[:8])}"
            return MemoryLimitError("out of memory while rows were read", where=where, do="give the host more memory")

    def _of_stream(self, samples: Streamed, renderer: Renderer, rows: Sequence[tuple[int, int]]) -> Batch:
        """The batch of those rows that are good. Where none is, it is a row further on that nothing is learned from, so
        that every rank has a forward."""
        good: list[Rendered] = []
        left: list[tuple[str, bool]] = []
        for row, epoch in rows:
            try:
                good.append(renderer.render(samples[row].at(epoch)))
            except MmftError as error:
                if not samples.leaves_out(error):
                    raise
                problem = error.problems[0]
                left.append((f"{problem.where}: {problem.what}", not isinstance(error, TooLongError)))
        blank = not good
        for further in range(1, len(samples) if blank else 0):
            try:
                found = renderer.render(samples[(rows[0][0] + further) % len(samples)])
            except MmftError as error:
                if not samples.leaves_out(error):
                    raise
                continue
            good.append(dataclasses.replace(found, labels=torch.full_like(found.labels, IGNORED)))
            break
        if not good:
            raise DataError(f"all {len(samples)} rows are bad", where=left[0][0], do="mend the data")
        batch = collate(good, pad_token_id=self._pad_token_id, side=self._side)
        return dataclasses.replace(batch, ids=() if blank else batch.ids, left_out=tuple(left))


def _whole_of_stream(samples: Streamed, renderer: Assembler, rows: Sequence[tuple[int, int]]) -> Batch:
    """The batch of as many rows as are asked for: in the place of a bad one stands the next good one after it. That
    depends on its number alone, so it is the same however a step is cut into batches."""
    try:
        return renderer.assemble([_taken(renderer, samples[row].at(epoch), epoch) for row, epoch in rows])
    except MmftError as error:
        if not samples.leaves_out(error):
            raise
    good: list[tuple[Sample, int]] = []
    left: list[tuple[str, bool]] = []
    for row, epoch in rows:
        for further in range(len(samples)):
            try:
                found = _taken(renderer, samples[(row + further) % len(samples)].at(epoch), epoch)
                renderer.assemble([found])
            except MmftError as error:
                if not samples.leaves_out(error):
                    raise
                if not further:
                    problem = error.problems[0]
                    left.append((f"{problem.where}: {problem.what}", not isinstance(error, TooLongError)))
                continue
            good.append(found)
            break
        else:
            raise DataError(f"all {len(samples)} rows are bad", where=left[0][0], do="mend the data")
    return dataclasses.replace(renderer.assemble(good), left_out=tuple(left))


def _taken(renderer: Assembler, sample: Sample, epoch: int) -> tuple[Sample, int]:
    """The row, where it is not longer than its batches may be. Raises TooLongError."""
    if not getattr(renderer, "refuses_long", False) and renderer.over_length != "truncate_text":
        length = renderer.length(sample)
        if length > renderer.max_length:
            raise TooLongError(
                f"the row has {length} tokens",
                where=sample.where or f"id {sample.id}",
                allowed=f"at most {renderer.max_length} tokens (data.max_length)",
                do="raise data.max_length, or set data.over_length to drop or truncate_text",
            )
    return sample, epoch


def near(samples: Sequence[Sample], count: int, renderer: RowRenderer) -> list[Sample]:
    """The first `count` rows; of streamed sets the first that can be made a batch of."""
    if not isinstance(samples, Streamed):
        return list(samples[:count])
    if isinstance(renderer, Renderer):
        return samples.near(count, renderer.render)
    return samples.near(count, lambda sample: renderer.assemble([_taken(renderer, sample.at(0), 0)]))


class _Steps(Sequence[MicroBatch]):
    """The flat list of a rank's micro-batches over [start, stop), computed item by item."""

    def __init__(self, plan: StepPlan, start: int, stop: int, rank: int) -> None:
        self._plan, self._start, self._rank = plan, start, rank
        self.per_step = len(range(rank, plan.micro_per_step, plan.world))
        self._length = max(0, stop - start) * self.per_step

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):  # type: ignore[override]
        step, micro = divmod(index, self.per_step)
        return self._plan.micro_batch_at(self._start + step, self._rank + micro * self._plan.world)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def batches(
    samples: Sequence[Sample],
    renderer: RowRenderer,
    plan: StepPlan,
    *,
    start_step: int,
    stop_step: int,
    rank: int,
    workers: int,
    pad_token_id: int,
    side: Side = "right",
) -> Iterator[list[Batch]]:
    """Yield the rank's micro-batches of every step in [start_step, stop_step), those that have rows.

    With `workers` > 0 that many processes render ahead (at most PREFETCH micro-batches each). A worker's MmftError is
    raised here as itself; a worker that died or hung is a DataError naming it.
    """
    work = _Steps(plan, start_step, stop_step, rank)
    if not work.per_step:
        for _ in range(start_step, stop_step):
            yield []
        return
    data = _MicroBatches(samples, renderer, work, pad_token_id, side)
    stream = _ahead(data, workers) if workers else (data[index] for index in range(len(data)))
    step: list[Batch | None] = []
    with closing(stream):  # an error's traceback keeps this frame, and would keep the workers with it
        for item in stream:
            if isinstance(item, MmftError):
                raise item
            step.append(item)
            if len(step) == work.per_step:
                yield [batch for batch in step if batch is not None]
                step = []


def _kill(children: Iterable[BaseProcess]) -> None:
    for child in children:
        if child.is_alive():
            child.kill()


def _ahead(data: _MicroBatches, workers: int) -> Generator[Batch | MmftError | None, None, None]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    loader = DataLoader(
        data,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork",
    )
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    stream = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever this process happens to be, in a backward pass or a save; without it the next
        # `next` tells of the lost worker.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    children = set(multiprocessing.active_children()) - before
    lost: str | None = None
    try:
        while lost is None:
            # With a timeout of its own torch looks for dead workers only when that is over; without, every 5 seconds.
            watch = threading.Timer(HANG_SECONDS, _kill, (children,))
            watch.daemon = True
            try:
                watch.start()  # torch's signal handler raises wherever this process happens to be
                item = next(stream)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # One that dies while it hands a batch over leaves a broken connection; what it raised is "Caught …".
                if "Caught " in str(error) or (isinstance(error, RuntimeError) and "DataLoader" not in str(error)):
                    raise
                lost = (
                    str(error) or type(error).__name__
                )  # the error itself would keep torch's iterator, and so the workers, alive
            finally:
                watch.cancel()
            if lost is None:
                yield item
    finally:
        del stream  # torch asks its workers to end, and waits a few seconds
        _kill(children)
        for child in children:
            child.join()
    raise DataError(
        f"a data worker was lost (dead, or without an answer for {HANG_SECONDS:.0f} s): {lost}",
        do="look for the kernel's out-of-memory killer, or set train.dataloader_num_workers to 0",
    )
