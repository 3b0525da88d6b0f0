"""What rounding to a stored type explains of the distance between a merged tensor and the exact `W + change`.

Rounding to nearest is monotone: values that lie within `slack` of the exact E were stored as something between
round(E - slack) and round(E + slack), which is one single value almost everywhere. A change far below the type's
spacing leaves most of W as it is; how much of it a right merge holds is therefore counted on round(E), never taken
to be all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
_TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float64: 0.0}
_ROUGH = 4  # roundings of the change that another tool may make: of A, B, their product and its scaling
_CLEAR = 0.5  # a share that is known no better than this is no ground for a word on it


@dataclass
class Tally:
    """Of one touched tensor: how far values are off, and how much of the wanted change is there.

    `own` takes exactly one rounding of the sum. For other tools each of W, the change and their sum may be rounded,
    and as three roundings hide a small change at every single value, all values together are looked at as well.
    """

    stored: torch.dtype
    own: bool
    off: float = 0.0
    worst: float = 0.0  # deviation in units of what is allowed
    got: float = 0.0  # <merged - W, change>
    want: float = 0.0  # the same of round(W + change)
    early: float = 0.0  # the same of round(round(W) + change)
    noise: float = 0.0  # the sum of squares by which independent roundings move `got`
    drift: float = 0.0  # the most by which float32 sums move it

    def add(self, got: torch.Tensor, want: torch.Tensor, *, weight: torch.Tensor, slack: torch.Tensor) -> None:
        """Count a block, all float64: merged values, exact ones, W, and what sums before the rounding are off by."""
        change = want - weight
        low, high = self._rounded(want - slack), self._rounded(want + slack)
        first = self._rounded(weight)
        away = (got - want).abs()
        if self.own:
            allowed = torch.maximum((low - want).abs(), (high - want).abs())
        else:
            sizes = want.abs() + slack + weight.abs() + change.abs()
            allowed = slack + UNIT.get(self.stored, 0.0) * sizes + _TINY.get(self.stored, 0.0)
            rough = _ROUGH * UNIT.get(self.stored, 0.0) * change.abs() + _TINY.get(self.stored, 0.0)
            loose = slack + (first - weight).abs() + rough
            wide = self._rounded(want + loose) - self._rounded(want - loose)
            self.noise += float((wide * change).square().sum())
        share = torch.where(away == 0, 0.0, away / allowed)
        worst = float(share.max()) if share.numel() else 0.0
        self.worst = max(self.worst, float("inf") if worst != worst else worst)
        self.off = max(self.off, float(away.max()) if away.numel() else 0.0)
        self.got += float(((got - weight) * change).sum())
        self.want += float(((self._rounded(want) - weight) * change).sum())
        self.early += float(((self._rounded(first + change) - weight) * change).sum())
        self.drift += float(((high - low) * change).abs().sum())

    def _rounded(self, exact: torch.Tensor) -> torch.Tensor:
        return exact.to(self.stored).double()

    @property
    def right(self) -> bool:
        """Whether rounding explains all that is off."""
        if not self.worst <= 1.001:
            return False
        wanted = (self.want,) if self.own else (self.want, self.early)
        return self.own or any(abs(self.got - want) <= self._near(want) for want in wanted)

    def _near(self, want: float) -> float:
        return 0.05 * abs(want) + 6 * self.noise**0.5 + self.drift

    @property
    def diagnosis(self) -> str:
        """What is wrong with a tensor that is not `right`."""
        off = f"is not W + s·BA: it is off by up to {self.off:.3g}, {self.worst:.3g} times what rounding allows"
        near = self._near(self.want) / self.want if self.want > 0 else float("inf")
        share = self.got / self.want if self.want > 0 else 1.0
        if not near <= _CLEAR:
            return off
        if abs(share) <= near:
            return "is not W + s·BA: the adapter is not in it (it is the base's)"
        if abs(share - 2) <= near:
            return "is not W + s·BA: the adapter is in it twice"
        if abs(share - 1) > max(near, 0.2) or self.worst <= 1.001:
            return f"is not W + s·BA: {share:.3g} times the adapter's change is in it"
        return off
