"""The settings of bottleneck adapters, as an ordinary peft config."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from torch.nn import functional

from mmft.errors import AdapterError, choices

PLACEMENTS = ("serial", "parallel")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky_relu": functional.leaky_relu,
}


class BottleneckType(enum.StrEnum):
    """The method's name in `adapter_config.json`. Equal to, and hashed like, the plain string.

    peft's own enumeration is closed (`register_peft_method` takes only its members), but its tables are looked up by
    string; a member of another string enumeration is found there and has the `value` that peft's messages print.
    """

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """`f(x) = scaling * up(dropout(activation(down(norm(x)))))` on sub-layers or linear layers.

    serial: `h <- h + f(h)` on the output (Houlsby et al. 2019, arXiv 1902.00751, which has scaling 1); parallel:
    `h <- sublayer(x) + f(x)` (He et al. 2022, arXiv 2110.04366). `target_modules` are names or suffixes, as in peft, of
    attention or MLP blocks (or linear layers). Raises AdapterError for a value out of range.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or one expression of the modules that get an adapter."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or one expression of modules that get none."}
    )
    bottleneck_size: int = field(default=64, metadata={"help": "Width between down and up."})
    placement: str = field(default="serial", metadata={"help": "serial or parallel."})
    activation: str = field(default="relu", metadata={"help": ", ".join(ACTIVATIONS)})
    scaling: float = field(default=1.0, metadata={"help": "Factor of the adapter's output; He et al. use 4."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout between activation and up."})
    layer_norm: bool = field(default=False, metadata={"help": "A LayerNorm before down."})
    init_weights: bool = field(default=True, metadata={"help": "up starts at zero; False: at random, for tests."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole, beside the adapter."}
    )

    mergeable: ClassVar[bool] = False
    """The activation makes the adapter a function that no weight of the base can hold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = BottleneckType.BOTTLENECK
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        for name, value, allowed in (
            ("placement", self.placement, PLACEMENTS),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in allowed:
                raise AdapterError(
                    f"{name} {value!r} is unknown",
                    where=f"BottleneckConfig.{name}",
                    allowed=choices(allowed, word=str(value)),
                    do="choose one of them",
                )
        if not isinstance(self.bottleneck_size, int) or self.bottleneck_size < 1:
            raise AdapterError(
                f"bottleneck_size {self.bottleneck_size!r} is no width",
                where="BottleneckConfig.bottleneck_size",
                allowed="a whole number of 1 or more",
                do="take 64, or about a tenth of the hidden size",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(
                f"dropout {self.dropout!r} is out of range",
                where="BottleneckConfig.dropout",
                allowed="0 up to, but not including, 1",
                do="take 0.0 or 0.1",
            )


def bottleneck_config(
    modules: Iterable[str],
    *,
    bottleneck_size: int = 64,
    placement: str = "serial",
    dropout: float = 0.0,
    scaling: float = 1.0,
    modules_to_save: Iterable[str] = (),
) -> BottleneckConfig:
    """The config for exactly these module names (of `bottleneck_modules`), as a recipe means it: relu, no norm."""
    return BottleneckConfig(
        target_modules=sorted(modules),
        bottleneck_size=bottleneck_size,
        placement=placement,
        dropout=dropout,
        scaling=scaling,
        modules_to_save=sorted(modules_to_save) or None,
    )
