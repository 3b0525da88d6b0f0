"""(IA)³, Liu et al. 2022 (arXiv 2205.05638): `W' = diag(l) W`, `b' = l b`; `W' = W diag(l)` before a feed-forward."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mmft.export.deltas.base import Adapter, Homeless, Matrix, Merge, Site, Step, is_conv, is_linear, is_transposed

PARTS = ("ia3_l",)
FIELDS = frozenset({"feedforward_modules", "init_ia3_weights", "fan_in_fan_out"})


@dataclass(frozen=True)
class Scale:
    """`axis` 0 scales rows, 1 columns; a column of a kernel is an input channel, `repeat` positions wide."""

    key: str
    axis: int
    repeat: int = 1
    kind: str = "ia3"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its one tensor."""
        return (self.key,)

    def open(self, adapter: Adapter, weight: Matrix) -> Merge:
        """Holds the vector."""
        scale = adapter.factor(self.key).reshape(-1)
        columns = scale.repeat_interleave(self.repeat)

        def merge(rows: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
            merged = torch.mul(rows, scale[start:stop, None] if self.axis == 0 else columns).to(rows.dtype)
            return merged, merged.float() - rows.float()

        return merge


def steps(site: Site) -> list[tuple[str, Step]]:
    """The steps of one module."""
    key = site.need("ia3_l")
    shape, count = site.shape(), sum(n != 1 for n in site.adapter.shape(key))
    layer = site.layer
    if not (is_linear(layer) or is_conv(layer) or is_transposed(layer)) or getattr(layer, "groups", 1) != 1:
        raise site.refuse("(IA)³", "Linear, Conv1D, Conv2d, Conv3d with one group")
    length = site.adapter.weights.entries[key].nbytes // site.adapter.weights.entries[key].dtype.itemsize
    feedforward = any(_is_feedforward(site.option("feedforward_modules"), name) for name in (site.module, site.spelled))
    outputs, inputs = (shape[1], shape[0]) if is_transposed(layer) else (shape[0], shape[1])
    if length != (inputs if feedforward else outputs) or count > 1:
        raise Homeless
    axis = int(feedforward) if not is_transposed(layer) else int(not feedforward)
    repeat = 1
    for size in shape[2:]:
        repeat *= size
    found: list[tuple[str, Step]] = [(site.name(), Scale(key, axis, repeat if axis else 1))]
    if not feedforward and site.name("bias") in site.shapes:
        found.append((site.name("bias"), Scale(key, 0)))
    return found


def _is_feedforward(modules: object, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return isinstance(modules, list | tuple | set) and any(name.endswith(str(module)) for module in modules)
