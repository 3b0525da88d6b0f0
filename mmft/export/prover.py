"""Two folders and an adapter, compared parameter by parameter in blocks of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from mmft.errors import ExportError, Problem
from mmft.export.delta import Adapter, Update, some
from mmft.export.merge import Onto
from mmft.export.names import NameMap
from mmft.export.reference import Apply, Exact, reference
from mmft.export.rounding import UNIT, Tally
from mmft.export.roundtrip import RoundTrip
from mmft.export.runtime import Runtime
from mmft.export.shards import blocks_of, view
from mmft.recipe.schema import QuantizationSection

_BLOCK = 1 << 20  # elements: each is held a dozen times in float64
_ROUNDINGS = {True: "one rounding", False: "one rounding each of W, the change and their sum"}


@dataclass
class _Findings:
    """What is wrong, each with the tensors' names."""

    texts: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, name: str) -> None:
        self.texts.setdefault(text, []).append(name)


class Prover:
    """Compares a merged folder with what base and adapter make; `own` marks a folder that mmft wrote."""

    def __init__(
        self,
        base: Runtime,
        merged: Runtime,
        adapter: Adapter,
        *,
        updates: dict[str, Update],
        quantized: frozenset[str],
        section: QuantizationSection | None,
        onto: Onto,
        dtype: torch.dtype | None,
        own: bool,
    ) -> None:
        self.base, self.merged, self.adapter, self.updates = base, merged, adapter, updates
        self.quantized, self.section, self.onto, self.dtype, self.own = quantized, section, onto, dtype, own
        self.untouched = self.untouched_bytes = self.touched = 0
        self.worst = 0.0
        self.worst_tensor: str | None = None
        self.left_out: list[str] = []
        self.digest = hashlib.sha256()
        self.bound = _ROUNDINGS[own]
        self._found = _Findings()
        self._on_disk: dict[str, list[Apply]] = {}

    def run(self) -> None:
        """Raise ExportError with all that is not what it must be."""
        names, others = self.base.names, self.merged.names
        seen: set[tuple[str | None, str | None]] = set()
        for name in names.shapes:
            source, there = self.base.source(name), self.merged.source(name)
            if source is None:
                continue
            if there is None:
                self._found.add("is missing in the merged folder", name)
                continue
            update = self._update(name)
            known = (source, there)
            if known in seen and (update is None or update is self.updates.get(source)):
                continue  # the second end of a tie that is still one
            seen.add(known)
            self._tensor(name, update)
        extra = [n for n in others.shapes if self.merged.source(n) and n not in names.shapes]
        for name in extra:
            self._found.add("is not in the base", name)
        self._unused(names, others)
        self._raise()

    def _update(self, name: str) -> Update | None:
        if name in self.updates:
            return self.updates[name]
        # trained tokens of a table are trained at both ends of its tie
        for one, other in self.base.names.ties.items():
            end = {one: other, other: one}.get(name)
            update = self.updates.get(end or "")
            if update is not None and all(step.kind == "tokens" for step in update.steps):
                return update
        return None

    def _tensor(self, name: str, update: Update | None) -> None:
        wanted = update.shape if update is not None and update.shape else self.base.names.shapes[name]
        stored, source = self.merged.dtype(name), self.base.dtype(name)
        kind = self.dtype if self.dtype is not None and source.is_floating_point else source
        if self.merged.names.shapes[name] != wanted or (self.own and stored != kind):
            found = f"{stored}{list(self.merged.names.shapes[name])}"
            self._found.add(f"is {found}, not {kind}{list(wanted)}", name)
        elif update is None and not self._moved_on_disk(name) and not self._dequantized(name):
            self._same(name)
        else:
            self._changed(name, update)

    def _dequantized(self, name: str) -> bool:
        return name in self.quantized and self.onto == "dequantized"

    def _moved_on_disk(self, name: str) -> bool:
        if not any(update.on_disk for update in self.updates.values()):
            return False
        rows = view(self.base.names.shapes[name], stacked=self.base.stacked(name))[0]
        return any(self._disk_update(piece.key) for piece in self.base.pieces(name, 0, rows) or ())

    def _disk_update(self, key: str) -> Update | None:
        update = self.updates.get(key)
        return update if update is not None and update.on_disk else None

    def _same(self, name: str) -> None:
        stacked = self.base.stacked(name) or self.merged.stacked(name)
        lossy = False
        for start, stop in blocks_of(*view(self.base.names.shapes[name], stacked=stacked), _BLOCK):
            want, got = self._read(self.base, name, start, stop, stacked), None
            got = self._read(self.merged, name, start, stop, stacked)
            data = _bytes(got)
            if data != _bytes(want.to(got.dtype)):
                if not self._coarser(want, got):
                    self._found.add("was not touched by the adapter, but its bytes differ", self._label(name))
                    return
                lossy = True
            self.digest.update(data)
            self.untouched_bytes += want.nbytes
        if lossy:
            self._found.add("was not touched by the adapter, but was rounded to 16 bits on the way", self._label(name))
        self.untouched += 1

    @staticmethod
    def _coarser(want: torch.Tensor, got: torch.Tensor) -> bool:
        types = (torch.bfloat16, torch.float16)
        return want.is_floating_point() and any(torch.equal(want.to(kind).to(got.dtype), got) for kind in types)

    @staticmethod
    def _read(side: Runtime, name: str, start: int, stop: int, stacked: bool) -> torch.Tensor:
        if side.stacked(name) or not stacked:
            return side.rows(name, start, stop)
        key = side.names.home[side.source(name) or name]
        return side.weights.matrix(key, start, stop, stacked=True)

    def _changed(self, name: str, update: Update | None) -> None:
        shape = update.shape if update is not None and update.shape else self.base.names.shapes[name]
        grouped = self.base.stacked(name) or self.merged.stacked(name)
        stacked = grouped or (update is not None and update.stacked)
        rows, width = view(shape, stacked=stacked)
        stored = self.merged.dtype(name)
        resized = update is not None and update.shape is not None

        def read(start: int, stop: int) -> torch.Tensor:
            if resized:
                return torch.zeros(stop - start, width, dtype=stored)
            block = self._read(self.base, name, start, stop, stacked)
            return block.to(stored) if self.own else block

        blocks = list(blocks_of(rows, width, _BLOCK))
        trip = None
        if self._dequantized(name):
            assert self.section is not None
            trip = RoundTrip(read, blocks, self.section)
        seen = trip.rows if trip is not None else read
        applied = self._applied(update, seen, blocks)
        unit, tally = UNIT.get(stored, 0.0), Tally(stored, self.own)
        for start, stop in blocks:
            weight = seen(start, stop).double()
            block: Exact = weight, torch.zeros_like(weight)
            for place, apply in enumerate(applied):
                if place:  # the rows are stored between two steps
                    block = block[0], block[1] + unit * block[0].abs()
                block = apply(block, start, stop, unit)
            block = self._disk_steps(name, block, start, stop, unit)
            got = self._read(self.merged, name, start, stop, stacked).double()
            tally.add(got, block[0], weight=weight, slack=block[1])
        self.touched += 1
        self._judge(name, tally, replaced=update is not None and update.replaced)

    def _applied(self, update: Update | None, seen: object, blocks: list[tuple[int, int]]) -> list[Apply]:
        applied: list[Apply] = []
        for step in update.steps if update is not None and not update.on_disk else ():

            def source() -> Iterator[tuple[torch.Tensor, int, int]]:
                yield from ((seen(start, stop), start, stop) for start, stop in blocks)  # type: ignore[operator]

            applied.append(reference(step, self.adapter, source))
        return applied

    def _disk_steps(self, name: str, block: Exact, start: int, stop: int, unit: float) -> Exact:
        """What the adapter does to the checkpoint's own tensors, at the rows they have in memory."""
        pieces = self.base.pieces(name, start, stop) if self._moved_on_disk(name) else ()
        at = 0
        value, slack = block
        for piece in pieces or ():
            update = self._disk_update(piece.key)
            part = slice(at, at + piece.count)
            at += piece.count
            if update is None:
                continue
            if piece.key not in self._on_disk:
                self._on_disk[piece.key] = [reference(step, self.adapter, lambda: iter(())) for step in update.steps]
            for apply in self._on_disk[piece.key]:
                one = apply((value[part], slack[part]), piece.row, piece.row + piece.count, unit)
                value[part], slack[part] = one
        return value, slack

    def _judge(self, name: str, tally: Tally, *, replaced: bool) -> None:
        label = self._label(name)
        if tally.worst >= self.worst:
            self.worst, self.worst_tensor = tally.worst, label
        if not tally.right:
            text = f"is not what the adapter holds: it is off by up to {tally.off:.3g}"
            self._found.add(text if replaced else tally.diagnosis, label)

    def _label(self, name: str) -> str:
        return self.merged.names.home.get(self.merged.source(name) or name, name)

    def _unused(self, names: NameMap, others: NameMap) -> None:
        """Tensors no module uses: mmft copies them, other tools may leave them out."""
        for key in names.unused:
            if key not in others.disk:
                if self.own:
                    self._found.add("is missing in the merged folder", key)
                else:
                    self.left_out.append(key)
                continue
            entry = self.base.weights.entries[key]
            for start, stop in blocks_of(*view(entry.shape), _BLOCK):
                want = self.base.weights.matrix(key, start, stop)
                got = self.merged.weights.matrix(key, start, stop)
                if _bytes(got) != _bytes(want.to(got.dtype)):
                    self._found.add("was not touched by the adapter, but its bytes differ", key)
                    break
                self.digest.update(_bytes(got))
                self.untouched_bytes += want.nbytes
            self.untouched += 1

    def _raise(self) -> None:
        if not self._found.texts:
            return
        every = {self._label(name): name for name in self.updates if name in self.base.names.shapes}
        problems = []
        for text, found in self._found.texts.items():
            part = _whole_part(found, every)
            problems.append(
                Problem(
                    f"{some(found)} {text}"
                    if len(found) == 1
                    else f"{len(found)} tensors{part}: each {text}: {some(found)}",
                    do="merge again (mmft merge), from this base and this adapter",
                )
            )
        raise ExportError(problems)


def _whole_part(found: list[str], every: dict[str, str]) -> str:
    """` (all that the adapter changes in vision_tower)`, when the names are just those of one part of the model."""
    stems = [name.split(".") for name in found]
    depth = 0
    while all(len(stem) > depth + 1 and stem[depth] == stems[0][depth] for stem in stems):
        depth += 1
    prefix = ".".join(stems[0][:depth])
    if not prefix:
        return " (all that the adapter changes)" if set(found) == set(every) else ""
    mine = {name for name in every if name.startswith(f"{prefix}.")}
    return f" (all that the adapter changes in {prefix})" if mine == set(found) and len(mine) < len(every) else ""


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
