"""The bytes of each merged tensor, block by block, with the norms of what was changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mmft.errors import ExportError
from mmft.export.delta import Adapter, Factors, Update
from mmft.export.names import Group, NameMap, load_group, save_group
from mmft.export.roundtrip import RoundTrip
from mmft.export.shards import Entry, Output, Weights, as_bytes, row_blocks
from mmft.recipe.schema import QuantizationSection


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

    def output(self, job: Job) -> Output:
        """Name, type and shape of what the job writes."""
        entry = self.weights.entries[job.source]
        return Output(job.key, self._type(entry), entry.shape)

    def pieces(self, output: Output) -> Iterator[memoryview]:
        """The bytes of one tensor."""
        job = self.jobs[output.name]
        entry = self.weights.entries[job.source]
        if job.group is not None and job.touched:
            yield as_bytes(self._group(job.group, job.touched)[job.key])
        elif job.update is None and not job.quantized:
            if output.dtype == entry.dtype:
                yield from self.weights.pieces(entry.name)
            else:
                for start, stop in row_blocks(entry):
                    yield as_bytes(self.weights.read(entry.name, start, stop).to(output.dtype))
        else:
            yield from self._merged(job, entry)

    def _type(self, entry: Entry) -> torch.dtype:
        return self.dtype if self.dtype is not None and entry.dtype.is_floating_point else entry.dtype

    def _merged(self, job: Job, entry: Entry) -> Iterator[memoryview]:
        def read(start: int, stop: int) -> torch.Tensor:
            return self.weights.read(entry.name, start, stop).to(self._type(entry))

        assert job.name is not None
        worker = _Worker(self, job.name, update=job.update, entry=entry, read=read if job.quantized else None)
        for start, stop in row_blocks(entry):
            yield as_bytes(worker.rows(read(start, stop), start, stop))
        self.changes[job.name] = worker.norms.change(job.name, job.key, worker.kind)

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
                do="merge with peft's merge_and_unload",
            )
        for name in sorted(touched):
            whole = memory[name].clone()
            entry = Entry(name, self.weights.entries[group.keys[0]].file, whole.dtype, tuple(whole.shape), 0, 0)

            def read(start: int, stop: int, whole: torch.Tensor = whole) -> torch.Tensor:
                return whole[start:stop]

            worker = _Worker(
                self,
                name,
                update=self.updates.get(name),
                entry=entry,
                read=read if name in self.quantized else None,
            )
            merged = [worker.rows(whole[start:stop].clone(), start, stop) for start, stop in row_blocks(entry)]
            memory[name] = torch.cat(merged) if whole.ndim else merged[0]
            self.changes[name] = worker.norms.change(name, ", ".join(group.keys), worker.kind)
        self._held = (group.first, save_group(group, memory, self.names.model))
        return self._held[1]


class _Worker:
    """What happens to the rows of one runtime parameter."""

    def __init__(self, producer: Producer, name: str, *, update: Update | None, entry: Entry, read: object) -> None:
        self.name, self.update, self.adapter = name, update, producer.adapter
        self.norms = _Norms()
        self.dequantize = producer.onto == "dequantized"
        self.factors = Factors(producer.adapter, update.lora) if update and update.lora else None
        self.trip = None
        if read is not None and producer.quantization is not None:
            self.trip = RoundTrip(read, row_blocks(entry), producer.quantization)  # type: ignore[arg-type]
            self.norms.lost = 0.0

    @property
    def kind(self) -> str:
        if self.update is None:
            return "dequantized" if self.dequantize else "measured"
        parts = (
            "replaced" if self.update.replace else "",
            "lora" if self.factors else "",
            "bias" if self.update.bias else "",
        )
        return "+".join(part for part in parts if part)

    def rows(self, weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The merged rows; `weight` may be changed in place."""
        dtype, norms = weight.dtype, self.norms
        norms.weight += _square(weight)
        if self.trip is not None:
            seen = self.trip.rows(start, stop)
            norms.lost = (norms.lost or 0.0) + _square(seen.float() - weight.float())
            weight = seen if self.dequantize else weight
        update = self.update
        if update is not None and update.replace:
            fresh = self.adapter.weights.read(update.replace, start, stop).to(dtype)
            norms.delta += _square(fresh.float() - weight.float())
            weight = fresh
        if self.factors is not None:
            weight, delta = self.factors.merge(weight, start, stop)
            norms.delta += _square(delta)
        if update is not None and update.bias:
            key, scaling = update.bias
            delta = self.adapter.factor(key)[start:stop] * scaling
            weight += delta
            norms.delta += _square(delta)
        if update is not None and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ExportError(f"{self.name} is not finite after the merge", do="merge into float32 or bfloat16")
        return weight


def _square(tensor: torch.Tensor) -> float:
    if not tensor.is_floating_point():
        tensor = tensor.float()
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2
