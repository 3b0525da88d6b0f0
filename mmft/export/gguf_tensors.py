"""The parameters of a model by their runtime names, and where each goes in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmft.errors import ExportError
from mmft.export.names import NameMap
from mmft.export.shards import Weights


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: from the runtime parameter `source`, by `change`; `full` keeps it in float32."""

    name: str
    source: str
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    full: bool = False


class Reader:
    """Runtime parameters by name."""

    def __init__(self, weights: Weights, names: NameMap) -> None:
        self.weights, self.names = weights, names

    def __contains__(self, name: str) -> bool:
        return name in self.names.home

    def read(self, name: str) -> torch.Tensor:
        """One parameter in the folder's own type."""
        if name not in self.names.home:
            raise ExportError(f"the folder has no tensor of its own for {name}", do="give the whole checkpoint")
        return self.weights.read(self.names.home[name])

    def prefix(self, module: Any) -> str:
        """Where a module sits in the model, with the dot."""
        return next(f"{name}." if name else "" for name, found in self.names.model.named_modules() if found is module)

    def below(self, prefix: str) -> list[str]:
        """Runtime names of the parameters below a module, in the model's order."""
        return [name for name in self.names.shapes if name.startswith(prefix)]
