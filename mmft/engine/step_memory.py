"""What a step needs by owner, from shapes; how many layers a budget asks to compute again; what a step really took.

    step = step_memory(config, StepSizes(rows, supervised, patches), fast=True)
    with Peak() as peak: ...
    peak.bytes

Anonymous memory is counted: pages that no file backs. Weights that safetensors maps from their file are the system's
to drop and read again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from mmft.fast.attention import KEPT_KEYS
from mmft.fast.linear_loss import CHUNK_BYTES


@dataclass(frozen=True)
class StepSizes:
    """What goes through the largest forward: tokens of each row, those with a target, patches of pictures."""

    rows: tuple[int, ...]
    supervised: int
    patches: int = 0


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step needs beyond weights and optimizer, by owner. `vision` is what the towers' forward, which comes
    first, takes beyond the two others."""

    activations: int
    logits: int
    vision: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.logits + self.vision


HEAP = 1.3
"""What malloc holds for each byte of activations: blocks of other lengths do not fit the gaps that are free."""
KERNEL_HEAP = 1.0
"""The same where layers are computed by `mmft.fast.native` into blocks that fit again (`mmft.fast.native_blocks`)."""


def layer_bytes(text: Any, rows: Sequence[int], *, fast: bool, width: int = 2) -> int:
    """What one language layer of a config keeps for the backward pass; `width`: bytes of a number that products take.

    Fast (`mmft.fast`): the two norms' inputs and outputs, q, k, v, the attention's output, gate and up, and the
    probabilities of rows of up to `KEPT_KEYS` tokens. Else what peft and autocast keep: about 18 hidden-wide and 5
    intermediate-wide values (in 16 bits fewer, much of it in float32).
    """
    hidden, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    heads: int = getattr(text, "num_attention_heads", 1)
    one_head: int = getattr(text, "head_dim", None) or hidden // heads
    keys: int = (getattr(text, "num_key_value_heads", None) or heads) * one_head
    if not fast:
        return width * sum(rows) * (18 * hidden + 5 * inner)
    return width * sum(rows) * (6 * hidden + 2 * keys + 2 * inner) + sum(
        width * heads * row * row for row in rows if row <= KEPT_KEYS
    )


def step_memory(
    config: Any,
    sizes: StepSizes,
    *,
    fast: bool,
    layers: int | None = None,
    recomputed: int = 0,
    towers: bool = False,
    width: int = 2,
    cast: int = 0,
    heap: float = HEAP,
    narrow: bool = False,
) -> StepMemory:
    """Estimate of a step from a model's config.

    `layers` that gradients pass (all by default), `recomputed` of which keep their input alone; `towers`: gradients
    pass them too; `width`: bytes of a number that products take; `cast`: bytes of weights that autocast keeps in 16
    bits from forward to backward; `heap`: what malloc holds for a byte of activations. The head keeps 12 bytes for each
    supervised row and word, of `CHUNK_BYTES` at most on the fast path; `narrow`: a kernel writes their gradient over
    logits of 16 bits.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers if layers is None else layers
    one, thin = layer_bytes(text, sizes.rows, fast=fast, width=width), width * sum(sizes.rows) * text.hidden_size
    kept = one * (count - recomputed) + thin * recomputed
    if recomputed:
        kept = max(kept, one + thin * recomputed)
    logits = 12 * sizes.supervised * text.vocab_size
    if fast:
        part = 6 if narrow else 1
        logits = min(logits // part, CHUNK_BYTES // part + width * sizes.supervised * text.hidden_size)
    vision = getattr(config, "vision_config", None)
    seen = width * _tower_values(vision, sizes.patches, trained=towers) if vision is not None else 0
    activations = int(heap * kept) + cast
    if towers:
        return StepMemory(activations, logits, int(heap * seen))
    return StepMemory(activations, logits, max(0, seen - activations - logits))


def _tower_values(vision: Any, patches: int, *, trained: bool) -> int:
    """A frozen tower holds one layer's values at a time; one that gradients pass keeps every layer's."""
    wide = _size(vision, "embed_dim", "hidden_size")
    inner = _size(vision, "intermediate_size") or int(wide * getattr(vision, "mlp_ratio", 4))
    deep = _size(vision, "num_hidden_layers", "depth")
    return patches * ((18 * wide + 5 * inner) * deep if trained else 10 * wide + 3 * inner)


def _size(config: Any, *names: str) -> int:
    """The first of some entries that a config has; 0 without any."""
    return next((int(value) for value in (getattr(config, name, None) for name in names) if value), 0)


def patches_of(config: Any, pixels: int) -> int:
    """Patches in that many pixel values."""
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "patch_size", None)
    if not isinstance(side, int):
        return 0
    return pixels // (3 * side * side * (getattr(vision, "temporal_patch_size", None) or 1))


def layers_asked(budget: int, step: StepMemory, *, rest: int, layers: int, thin: int) -> int:
    """How many of `layers` have to be recomputed for a step to stay within `budget` beside the `rest`; all of them
    where even that is too little. `thin`: what a recomputed layer keeps."""
    over = rest + step.total - budget
    if over <= 0:
        return 0
    saved = step.activations / max(layers, 1) - HEAP * thin
    return min(layers, math.ceil(over / saved)) if saved > 0 else layers


def held() -> int:
    """Bytes of this process that no file backs; allocated bytes of the device where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


class Peak:
    """The most that was held while open, looked at 20 times a second (on a device by its own counter)."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._look, daemon=True, name="mmft-memory")

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, held())

    def __enter__(self) -> Peak:
        self.bytes = held()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        last = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else held()
        self.bytes = max(self.bytes, int(last))
