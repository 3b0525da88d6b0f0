"""Features of frozen encoders, computed once for each row: modality -> all rows' tokens behind one another.

A row's tokens do not depend on the rows beside it (`encoders`), so that a stored feature is what the encoder would say
in any batch, to the rounding of its products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmft.fusion.config import TABLE

_ENDS = "ends"


@dataclass(frozen=True)
class FeatureStore:
    """`path`: one safetensors file with `NAME` (all tokens, D) and `NAME.ends` (N,), where each row's tokens end."""

    path: Path
    ends: Mapping[str, list[int]]

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """A store that `build` wrote; tokens stay on disk."""
        with safe_open(path, framework="pt") as file:
            held = list(file.keys())
            names = [name for name in held if name.endswith(f".{_ENDS}")]
            return cls(path, {name.removesuffix(f".{_ENDS}"): file.get_tensor(name).tolist() for name in names})

    @classmethod
    def build(
        cls,
        path: Path,
        model: Any,
        batches: Iterable[Mapping[str, Any]],
        names: Sequence[str],
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> FeatureStore:
        """Run the encoders `names` of a `FusionModel` over batches of its processor, in the order of the rows."""
        pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        model.eval()
        for batch in batches:
            for name in names:
                pieces[name] += _encoded(model, name, batch)
            progress(len(next(iter(batch["present"].values()))))
        held: dict[str, Tensor] = {}
        for name, found in pieces.items():
            held[name] = torch.cat(found)
            held[f"{name}.{_ENDS}"] = torch.tensor([len(one) for one in found]).cumsum(0)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        save_file(held, part)
        part.replace(path)
        return cls.open(path)

    @property
    def names(self) -> tuple[str, ...]:
        """Modalities that are stored."""
        return tuple(self.ends)

    def batch(self, rows: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """Modality -> `{"features", "mask"}` of these rows, for `FusionModel` in the place of the encoders' inputs; a
        modality that none of them has is left out."""
        out = {}
        os.utime(self.path)  # the cache throws out what nobody has used for longest
        with safe_open(self.path, framework="pt") as file:
            for name, ends in self.ends.items():
                tokens = file.get_slice(name)
                found = [tokens[(ends[row - 1] if row else 0) : ends[row]] for row in rows]
                if any(len(one) for one in found):
                    features = pad_sequence(found, batch_first=True)
                    lengths = torch.tensor([len(one) for one in found])
                    out[name] = {"features": features, "mask": torch.arange(features.shape[1]) < lengths[:, None]}
        return out


@torch.no_grad()
def _encoded(model: Any, name: str, batch: Mapping[str, Any]) -> list[Tensor]:
    """Each row's tokens (T, D); none for a row that lacks the modality."""
    assert name != TABLE, "a table has no frozen encoder"
    present = batch["present"][name]
    width = int(model.encoders[name].width)
    out = [torch.zeros(0, width) for _ in range(len(present))]
    rows = present.nonzero().flatten().tolist()
    if rows:
        inputs = {key: value[rows].to(model.device) for key, value in batch["modalities"][name].items()}
        tokens, mask = model.encode(name, inputs)
        for row, one, there in zip(rows, tokens, mask, strict=True):
            out[row] = one[there].cpu().contiguous()
    return out
