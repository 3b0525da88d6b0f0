"""The pictures of one row on a way of their own past the batch: to the tower alone, or from what it said before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Pictures:
    """`key`: their address in the feature store, "" where they are not kept. Either `known` (features), or `inputs`
    (what the tower takes) and `record` (what is stored beside the tower's answer)."""

    key: str
    inputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    record: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def answer(self, known: Mapping[str, Tensor]) -> None:
        """Keep what the tower says in the place of what it took: features are a hundredth of pixels, which would else
        stay until the step's end."""
        self.known, self.inputs = known, {}
