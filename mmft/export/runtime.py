"""The parameters of a model folder by their runtime names, read in blocks of rows whatever the checkpoint's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmft.export.names import Group, NameMap, load_group
from mmft.export.shards import Weights, view


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `row:row + count` of a checkpoint tensor, in the order they have in memory."""

    key: str
    row: int
    count: int


class Runtime:
    """Reads rows of runtime parameters. A group that the loader converts by more than moving rows is held whole."""

    def __init__(self, weights: Weights, names: NameMap) -> None:
        self.weights, self.names = weights, names
        self._group_of = {target: group for group in names.groups for target in group.targets}
        self._held: tuple[str, dict[str, torch.Tensor]] | None = None

    def source(self, name: str) -> str | None:
        """The name whose tensor `name` shares or is; None when the folder has none."""
        for candidate in (name, self.names.ties.get(name, name)):
            if candidate in self.names.home or candidate in self._group_of:
                return candidate
        return None

    def dtype(self, name: str) -> torch.dtype:
        """Type of the stored values."""
        source = self.source(name) or name
        key = self.names.home.get(source)
        return self.weights.entries[key or self._group_of[source].keys[0]].dtype

    def stacked(self, name: str) -> bool:
        """Whether its rows must be counted as those of a stack (see `shards.view`) to be read in pieces."""
        source = self.source(name)
        return source in self._group_of

    def pieces(self, name: str, start: int, stop: int) -> list[Piece] | None:
        """Where rows `start:stop` lie on disk; None when their group can only be converted whole."""
        source = self.source(name) or name
        if source in self.names.home:
            return [Piece(self.names.home[source], start, stop - start)]
        segments = self.names.segments(self._group_of[source])
        if segments is None:
            return None
        found = []
        for segment in sorted((s for s in segments if s.target == source), key=lambda s: s.target_row):
            first, last = max(start, segment.target_row), min(stop, segment.target_row + segment.count)
            if first < last:
                found.append(Piece(segment.key, segment.row + first - segment.target_row, last - first))
        return found

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` as a new tensor (stop - start, width)."""
        stacked = self.stacked(name)
        pieces = self.pieces(name, start, stop)
        if pieces is None:
            source = self.source(name) or name
            whole = self._whole(self._group_of[source])[source]
            return whole.reshape(view(tuple(whole.shape), stacked=stacked))[start:stop].clone()
        read = [self.weights.matrix(p.key, p.row, p.row + p.count, stacked=stacked) for p in pieces]
        return read[0] if len(read) == 1 else torch.cat(read)

    def _whole(self, group: Group) -> dict[str, torch.Tensor]:
        if self._held is None or self._held[0] != group.first:
            self._held = None
            self._held = (
                group.first,
                load_group(group, {key: self.weights.read(key) for key in group.keys}, self.names.model),
            )
        return self._held[1]
