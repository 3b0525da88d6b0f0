"""The proof of a merge: untouched bytes, recomputed updates, equal outputs.

Nothing of `delta.py`'s arithmetic is used here: updates are recomputed in float64 and must lie within the rounding of
the stored type. Raises ExportError when a proof fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.errors import CheckpointError, ExportError
from mmft.export.delta import Adapter, Lora, open_adapter, resolve_updates
from mmft.export.merge import REPORT, Onto, plan_jobs, quantized_names
from mmft.export.names import NameMap, load_group, map_names, meta_model
from mmft.export.outputs import Comparison, compare_outputs
from mmft.export.produce import Job
from mmft.export.roundtrip import RoundTrip
from mmft.export.shards import Weights, row_blocks, weight_files
from mmft.files import verify_folder
from mmft.recipe.schema import QuantizationSection

_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
_TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float64: 0.0}


@dataclass(frozen=True)
class VerifyReport:
    """What was proved. `worst` is the largest deviation of a touched value, in units of what rounding allows."""

    merged: str
    onto: Onto
    untouched: int
    untouched_bytes: int
    untouched_sha256: str
    touched: int
    worst: float
    worst_tensor: str | None
    outputs: Comparison | None
    outputs_other_base: Comparison | None  # a quantized base only: the merge that was not chosen

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def verify_merge(
    base_folder: Path,
    adapter_folder: Path,
    merged_folder: Path,
    *,
    rows: Sequence[Mapping[str, torch.Tensor]] = (),
    adapter_model: nn.Module | None = None,
    dtype: str | None = None,
) -> VerifyReport:
    """Prove that `merged_folder` is base plus adapter; what was quantized is read from its merge_report.json.

    `rows` are model inputs (each a batch; `labels`, if there, select the positions that count). `adapter_model` is
    the trained model, quantized if training was; without it, base and adapter are loaded as peft does, in `dtype`.
    With a quantized base, the outputs are checked for a merge onto the dequantized weights and reported for one onto
    the original weights. Price: two reads of both folders, and both models in memory while outputs are compared.
    """
    base_folder, adapter_folder, merged_folder = Path(base_folder), Path(adapter_folder), Path(merged_folder)
    try:
        verify_folder(merged_folder)
        stated = json.loads((merged_folder / REPORT).read_bytes())
    except (CheckpointError, OSError, ValueError) as error:
        raise ExportError(
            f"the merged folder is damaged: {error}", where=str(merged_folder), do="merge again"
        ) from error
    section = QuantizationSection(**stated["quantization"]) if stated["quantization"] else None
    adapter = open_adapter(adapter_folder)
    with (
        adapter.weights,
        Weights(weight_files(base_folder)) as base,
        Weights(weight_files(merged_folder)) as merged,
    ):
        prover = _Prover(
            base,
            merged,
            adapter,
            names=map_names(meta_model(base_folder), base.entries),
            section=section,
            stated=stated,
        )
        prover.run()
    outputs = other = None
    if rows:
        outputs, other = compare_outputs(
            base_folder,
            adapter_folder,
            merged_folder,
            rows=rows,
            adapter_model=adapter_model,
            dtype=dtype,
            stated=stated,
            section=section,
        )
    return VerifyReport(
        merged=str(merged_folder),
        onto=stated["onto"],
        untouched=prover.untouched,
        untouched_bytes=prover.untouched_bytes,
        untouched_sha256=prover.digest.hexdigest(),
        touched=prover.touched,
        worst=prover.worst,
        worst_tensor=prover.worst_tensor,
        outputs=outputs,
        outputs_other_base=other,
    )


class _Prover:
    """Compares two folders tensor by tensor."""

    def __init__(
        self,
        base: Weights,
        merged: Weights,
        adapter: Adapter,
        *,
        names: NameMap,
        section: QuantizationSection | None,
        stated: Mapping[str, Any],
    ) -> None:
        self.base, self.merged, self.adapter, self.names, self.section = base, merged, adapter, names, section
        self.dtype: torch.dtype | None = getattr(torch, stated["dtype"]) if stated["dtype"] else None
        self.onto: Onto = stated["onto"]
        self.updates = resolve_updates(adapter, names)
        self.quantized = quantized_names(names, stated["quantized_modules"], self.updates)
        self.jobs, _ = plan_jobs(names, self.updates, base, adapter=adapter, quantized=self.quantized, onto=self.onto)
        self.untouched = self.untouched_bytes = self.touched = 0
        self.worst = 0.0
        self.worst_tensor: str | None = None
        self.digest = hashlib.sha256()

    def run(self) -> None:
        """Raise ExportError at the first tensor that is not what it must be."""
        odd = sorted(self.jobs.keys() ^ self.merged.entries.keys())
        if odd:
            raise ExportError(f"the merged folder's tensors are not the base's: {', '.join(odd[:8])}", do="merge again")
        groups = []
        for job in self.jobs.values():
            entry, source = self.merged.entries[job.key], self.base.entries[job.source]
            want = self.dtype if self.dtype and source.dtype.is_floating_point else source.dtype
            if entry.shape != source.shape or entry.dtype != want:
                raise ExportError(
                    f"{job.key} is {entry.dtype}{list(entry.shape)}, not {want}{list(source.shape)}", do="merge again"
                )
            if not job.changed(self.onto):
                self._untouched(job)
            elif job.group is None:
                self._touched(job)
            elif job.group.first not in groups:
                groups.append(job.group.first)
                self._group(job)
            self.touched += job.changed(self.onto)

    def _untouched(self, job: Job) -> None:
        entry, source = self.merged.entries[job.key], self.base.entries[job.source]
        for start, stop in row_blocks(entry):
            got, want = self.merged.read(job.key, start, stop), self.base.read(job.source, start, stop)
            want = want.to(entry.dtype)
            data = _bytes(got)
            if data != _bytes(want):
                raise ExportError(
                    f"{job.key} was not touched by the adapter, but its bytes differ",
                    where=str(entry.file),
                    do="merge again",
                )
            self.digest.update(data)
        self.untouched += 1
        self.untouched_bytes += source.nbytes

    def _touched(self, job: Job) -> None:
        assert job.name is not None

        def read(start: int, stop: int) -> torch.Tensor:
            return self.base.read(job.source, start, stop).to(self.merged.entries[job.key].dtype)

        blocks = list(row_blocks(self.base.entries[job.source]))
        reference = self._reference(job.name, read, blocks)
        for (start, stop), (want, allowed) in zip(blocks, reference, strict=True):
            self._compare(job.key, self.merged.read(job.key, start, stop), want, allowed)

    def _group(self, job: Job) -> None:
        assert job.group is not None
        model, group = self.names.model, job.group
        types = {key: self.merged.entries[key].dtype for key in group.keys}
        old = load_group(group, {key: self.base.read(key).to(types[key]) for key in group.keys}, model)
        new = load_group(group, {key: self.merged.read(key) for key in group.keys}, model)
        for name in group.targets:
            if name not in job.touched:
                if not torch.equal(old[name], new[name]):
                    raise ExportError(f"{name} was not touched by the adapter, but it differs", do="merge again")
                continue
            whole = old[name]
            blocks = [(0, whole.shape[0])]
            for want, allowed in self._reference(name, lambda start, stop, whole=whole: whole[start:stop], blocks):
                self._compare(name, new[name], want, allowed)

    def _reference(
        self, name: str, read: Any, blocks: list[tuple[int, int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Per block, the float64 value and the deviation that rounding explains."""
        update = self.updates.get(name)
        trip = None
        if name in self.quantized and self.onto == "dequantized":
            assert self.section is not None
            trip = RoundTrip(read, blocks, self.section)
        for start, stop in blocks:
            weight = trip.rows(start, stop) if trip else read(start, stop)
            if update is not None and update.replace:
                weight = self.adapter.weights.read(update.replace, start, stop).to(weight.dtype)
            unit = _UNIT.get(weight.dtype, 0.0)
            want = weight.double()
            allowed = torch.zeros_like(want)
            if update is not None and update.lora:
                want, allowed = _exact(self.adapter, update.lora, want, rows=slice(start, stop), unit=unit)
            if update is not None and update.bias:
                key, scaling = update.bias
                want = want + self.adapter.weights.read(key)[start:stop].double() * scaling
                allowed = allowed + 2 * 2.0**-24 * want.abs()
            if update is not None and (update.lora or update.bias):
                allowed = allowed + unit * (want.abs() + allowed) + _TINY.get(weight.dtype, 0.0)
            yield want, allowed

    def _compare(self, key: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> None:
        away = (got.double() - want).abs()
        share = torch.where(away == 0, 0.0, away / allowed)
        worst = float(share.max()) if share.numel() else 0.0
        if not worst <= 1.001:
            raise ExportError(
                f"{key} is not W + s·BA: it is off by up to {float(away.max()):.3g}, "
                f"{worst:.3g} times what rounding allows",
                where=str(self.merged.entries[key].file) if key in self.merged.entries else None,
                do="merge again",
            )
        if worst >= self.worst:
            self.worst, self.worst_tensor = worst, key


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _exact(
    adapter: Adapter, lora: Lora, weight: torch.Tensor, *, rows: slice, unit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`W + s B A` of some rows in float64, and what float32 products (and an embedding's extra rounding) may add.

    A float32 sum of r products is off by at most about (r + 2) 2^-24 of the sum of their sizes.
    """
    a, b = adapter.weights.read(lora.a).double(), adapter.weights.read(lora.b).double()
    shape = weight.shape
    if lora.kind in ("embedding", "conv1d"):
        left, right = a[:, rows].T, b.T
    else:
        left, right = b[rows].flatten(1), a.flatten(1)
    delta = (left @ right * lora.scaling).reshape(shape)
    size = (left.abs() @ right.abs() * abs(lora.scaling)).reshape(shape)
    slack = (lora.rank + 4) * 2.0**-24 * size + 2.0**-24 * (weight.abs() + delta.abs())
    if lora.kind == "embedding":
        slack = slack + unit * delta.abs()
    total = weight + delta
    if lora.magnitude:
        norm = total.norm(dim=1, keepdim=True)
        factor = adapter.weights.read(lora.magnitude)[rows].double().view(-1, 1) / norm
        noise = slack.norm(dim=1, keepdim=True) / norm + shape[1] ** 0.5 * 2.0**-22
        return factor * total, factor.abs() * (slack + total.abs() * noise)
    return total, slack
