"""The bytes of each merged tensor, block by block, with the norms of what was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from mmft.errors import ExportError
from mmft.export.delta import Adapter, Update
from mmft.export.deltas.base import WHOLE, Matrix, Sum
from mmft.export.names import Group, NameMap, Segment, load_group, save_group
from mmft.export.roundtrip import RoundTrip
from mmft.export.shards import Entry, Output, Weights, as_bytes, blocks_of, row_blocks, view
from mmft.recipe.schema import QuantizationSection

Read = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """One checkpoint tensor to write: from the base's tensor `source`, called `name` in memory."""

    key: str
    source: str
    name: str | None
    update: Update | None
    quantized: bool
    group: Group | None = field(repr=False, default=None)
    touched: frozenset[str] = frozenset()  # runtime names of its group that change

    def changed(self, onto: str) -> bool:
        """Whether its values differ from the base's by more than the type."""
        return bool(self.update or self.touched or (self.quantized and onto == "dequantized"))


@dataclass(frozen=True)
class Change:
    """Norms of one changed (or measured) runtime parameter."""

    name: str
    key: str
    kind: str
    weight_norm: float
    delta_norm: float
    quantization_error: float | None = None  # |W - dequantized W|
    relative_error: float | None = None  # the same over |W|
    error_to_delta: float | None = None  # the same over |delta|


@dataclass
class _Norms:
    """Sums of squares."""

    weight: float = 0.0
    delta: float = 0.0
    lost: float | None = None

    def change(self, name: str, key: str, kind: str) -> Change:
        weight, delta = self.weight**0.5, self.delta**0.5
        lost = None if self.lost is None else self.lost**0.5
        return Change(
            name,
            key,
            kind,
            weight,
            delta,
            lost,
            None if lost is None or not weight else lost / weight,
            None if lost is None or not delta else lost / delta,
        )


class Producer:
    """Turns jobs into bytes; `changes` fills up as they are written."""

    def __init__(
        self,
        adapter: Adapter,
        weights: Weights,
        names: NameMap,
        *,
        jobs: dict[str, Job],
        updates: dict[str, Update],
        quantized: frozenset[str],
        dtype: str | None,
        quantization: QuantizationSection | None,
        onto: str,
    ) -> None:
        self.adapter, self.weights, self.names, self.jobs = adapter, weights, names, jobs
        self.updates, self.quantized = updates, quantized
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.quantization, self.onto = quantization, onto
        self.changes: dict[str, Change] = {}
        self._held: tuple[str, dict[str, torch.Tensor]] | None = None
        self._workers: dict[str, _Worker] = {}

    def output(self, job: Job) -> Output:
        """Name, type and shape of what the job writes."""
        entry = self.weights.entries[job.source]
        shape = job.update.shape if job.update and job.update.shape else entry.shape
        return Output(job.key, self._type(entry), shape)

    def pieces(self, output: Output) -> Iterator[memoryview]:
        """The bytes of one tensor."""
        job = self.jobs[output.name]
        entry = self.weights.entries[job.source]
        if job.group is not None and job.touched:
            if (segments := self._streamed(job)) is not None:
                yield from self._moved(job, entry, segments)
            else:
                yield as_bytes(self._group(job.group, job.touched)[job.key])
        elif job.update is None and not job.quantized:
            if output.dtype == entry.dtype:
                yield from self.weights.pieces(entry.name)
            else:
                for start, stop in row_blocks(entry):
                    yield as_bytes(self.weights.read(entry.name, start, stop).to(output.dtype))
        else:
            yield from self._merged(job, entry, output)

    def _type(self, entry: Entry) -> torch.dtype:
        return self.dtype if self.dtype is not None and entry.dtype.is_floating_point else entry.dtype

    def _merged(self, job: Job, entry: Entry, output: Output) -> Iterator[memoryview]:
        stacked = job.update is not None and job.update.stacked
        rows, width = view(output.shape, stacked=stacked)
        resized = output.shape != entry.shape

        def read(start: int, stop: int) -> torch.Tensor:
            if resized:  # the adapter brings the whole table; the base has no such rows
                return torch.zeros(stop - start, width, dtype=output.dtype)
            return self.weights.matrix(entry.name, start, stop, stacked=stacked).to(output.dtype)

        name = job.name or job.key
        worker = _Worker(self, name, update=job.update, read=read, size=(rows, width), trip=job.quantized)
        for start, stop in blocks_of(rows, width):
            yield as_bytes(worker.rows(read(start, stop), start, stop))
        self.changes[name] = worker.norms.change(name, job.key, worker.kind)

    def _streamed(self, job: Job) -> list[Segment] | None:
        """The rows of this tensor in memory, when all that changes in its group can be done in pieces."""
        assert job.group is not None
        for name in job.touched:
            update = self.updates.get(name)
            plain = len(self.names.shapes[name]) < 3 or (update is not None and (update.stacked or update.replaced))
            if name in self.quantized or not plain:
                return None
        segments = self.names.segments(job.group)
        return None if segments is None else [segment for segment in segments if segment.key == job.key]

    def _moved(self, job: Job, entry: Entry, segments: list[Segment]) -> Iterator[memoryview]:
        assert job.group is not None
        dtype = self._type(entry)
        for segment in sorted(segments, key=lambda segment: segment.row):
            worker = self._worker(segment.target, job) if segment.target in job.touched else None
            width = view(entry.shape, stacked=True)[1]
            for start, stop in blocks_of(segment.count, width):
                rows = self.weights.matrix(entry.name, segment.row + start, segment.row + stop, stacked=True).to(dtype)
                if worker is not None:
                    first = segment.target_row + start
                    rows = worker.rows(rows, first, first + stop - start)
                yield as_bytes(rows)
            if worker is not None:
                keys = ", ".join(job.group.keys) if len(job.group.keys) < 9 else f"{len(job.group.keys)} tensors"
                self.changes[segment.target] = worker.norms.change(segment.target, keys, worker.kind)

    def _worker(self, name: str, job: Job) -> _Worker:
        """One worker per runtime tensor while its checkpoint tensors are written; the last few are kept."""
        if name not in self._workers:
            while len(self._workers) > 3:  # its norms go on from what `changes` says when it comes back
                del self._workers[next(iter(self._workers))]
            size = view(self.names.shapes[name], stacked=True)
            worker = _Worker(self, name, update=self.updates.get(name), read=_never, size=size)
            if (before := self.changes.get(name)) is not None:
                worker.norms = _Norms(before.weight_norm**2, before.delta_norm**2)
            self._workers[name] = worker
        return self._workers[name]

    def _group(self, group: Group, touched: frozenset[str]) -> dict[str, torch.Tensor]:
        if self._held is not None and self._held[0] == group.first:
            return self._held[1]
        self._held = None
        disk = {key: self.weights.read(key).to(self._type(self.weights.entries[key])) for key in group.keys}
        memory = load_group(group, disk, self.names.model)
        again = save_group(group, memory, self.names.model)
        broken = [key for key in group.keys if not torch.equal(again[key], disk[key])]
        if broken:
            raise ExportError(
                f"{', '.join(broken)}: the loader's conversion cannot be turned back, so the adapter on "
                f"{', '.join(sorted(touched))} cannot be merged by streaming",
                do=WHOLE,
            )
        for name in sorted(touched):
            update = self.updates.get(name)
            whole = memory[name]
            size = view(tuple(whole.shape), stacked=update is not None and update.stacked)
            flat = whole.reshape(size)

            def read(start: int, stop: int, flat: torch.Tensor = flat) -> torch.Tensor:
                return flat[start:stop].clone()

            worker = _Worker(self, name, update=update, read=read, size=size, trip=name in self.quantized)
            merged = [worker.rows(read(start, stop), start, stop) for start, stop in blocks_of(*size)]
            memory[name] = torch.cat(merged).reshape(whole.shape)
            self.changes[name] = worker.norms.change(name, ", ".join(group.keys), worker.kind)
        self._held = (group.first, save_group(group, memory, self.names.model))
        return self._held[1]


class _Worker:
    """What happens to the rows of one parameter."""

    def __init__(
        self,
        producer: Producer,
        name: str,
        *,
        update: Update | None,
        read: Read,
        size: tuple[int, int],
        trip: bool = False,
    ) -> None:
        self.name, self.update = name, update
        self.norms = _Norms()
        self.dequantize = producer.onto == "dequantized"
        self.trip = None
        if trip and producer.quantization is not None:
            self.trip = RoundTrip(read, blocks_of(*size), producer.quantization)
            self.norms.lost = 0.0
        self.steps: list = []
        source = Matrix(*size, read=self._seen(read), blocks=lambda: blocks_of(*size))
        for step in update.steps if update is not None else ():
            done = step.open(producer.adapter, source)
            self.steps.append(done)
            source = replace(source, read=_after(source.read, done))

    def _seen(self, read: Read) -> Read:
        trip = self.trip
        return trip.rows if trip is not None and self.dequantize else read

    @property
    def kind(self) -> str:
        """A word for the report."""
        if self.update is None:
            return "dequantized" if self.dequantize else "measured"
        return self.update.kind

    def rows(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The merged rows; `weight` may be changed in place."""
        norms = self.norms
        if self.trip is None and len(self.steps) == 1 and isinstance(self.steps[0], Sum):
            return self._sum(self.steps[0], weight, start, stop)
        size = _square(weight)
        norms.weight += size
        bound = size**0.5
        if self.trip is not None:
            seen = self.trip.rows(start, stop)
            norms.lost = (norms.lost or 0.0) + _square(seen.float() - weight.float())
            weight = seen if self.dequantize else weight
        for step in self.steps:
            weight, delta = step(weight, start, stop)
            size = _square(delta)
            norms.delta += size
            bound += size**0.5
        if self.steps and weight.is_floating_point():
            self._finite(weight, bound)
        return weight

    def _sum(self, step: Sum, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`rows` of the commonest update, with the rows widened to float32 once for the norm and the sum."""
        wide = weight.float()
        size = _square(wide)
        merged, delta = step.onto(wide, start, stop, dtype=weight.dtype)
        added = _square(delta)
        self.norms.weight += size
        self.norms.delta += added
        self._finite(merged, size**0.5 + added**0.5)
        return merged

    def _finite(self, merged: torch.Tensor, bound: float) -> None:
        # No value is larger than the norms together; only where these tell nothing is each looked at.
        if not (bound < torch.finfo(merged.dtype).max / 2 or torch.isfinite(merged).all()):
            raise ExportError(f"{self.name} is not finite after the merge", do="merge into float32 or bfloat16")


def _after(read: Read, step: Callable) -> Read:
    return lambda start, stop: step(read(start, stop), start, stop)[0]


def _never(start: int, stop: int) -> torch.Tensor:
    raise ExportError(
        "a table whose scale depends on whole columns is converted in pieces by the loader",
        do=WHOLE,
    )


def _square(tensor: torch.Tensor) -> float:
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()  # norms of 16-bit types take thrice the time
    return float(torch.linalg.vector_norm(tensor)) ** 2
