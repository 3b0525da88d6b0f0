"""Cross-entropy of a frozen vocabulary head by the kernel of `native/loss.c`, with the gradient of its input.

The logits lie once, in bfloat16, and become their own gradient there; torch has them three times, two of them in
float32 (`linear_loss`), and reads them nine. Both products are panels of the product kernel, the second one over blocks
of the vocabulary, where oneDNN makes half of the machine's rate for a few dozen rows. Price: none.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mmft.fast.native_build import chosen, pointer, whole
from mmft.fast.native_product import panels

BLOCK = 1024
"""Words of a block, as in the source."""


def fits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is chosen and can take states (n, h) and a head (words, h)."""
    if chosen() is None or not len(hidden) or hidden.shape[1] % 2 or weight.shape[0] % 2:
        return False
    return weight.shape[1:] == hidden.shape[1:] and whole(hidden, weight)


def head_loss(
    hidden: Tensor, weight: Tensor, goals: Tensor, room: Tensor, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For what `fits`, with goals (n,): each row's loss (n,) in float32, and 1 where the first largest logit is the
    goal's, else 0 (n,). `room` (n, words) takes the logits; `slope` (n, h), where it is given, the gradient of the sum
    of losses. Raises IndexError for goals that are no words, ValueError for tensors of other shapes or types."""
    (rows, width), words = hidden.shape, len(weight)
    sound = goals.shape == (rows,) and room.shape == (rows, words)
    sound = sound and (slope is None or slope.shape == hidden.shape)
    if not sound or not whole(room, *(() if slope is None else (slope,))):
        raise ValueError(f"{rows} rows, goals {tuple(goals.shape)}, room {tuple(room.shape)} {room.dtype}")
    if int(goals.min()) < 0 or int(goals.max()) >= words:
        raise IndexError(f"goals from {int(goals.min())} to {int(goals.max())}, where there are {words} words")
    goals = goals.contiguous().to(torch.int64)
    terms, hits = hidden.new_empty(rows, dtype=torch.float32), goals.new_empty(rows)
    sums = hidden.new_empty((rows, width) if slope is not None else 0, dtype=torch.float32)
    packed, each, threads = panels(max(width, BLOCK))
    tensors = (hidden, weight, goals, room, terms, hits, sums, slope)
    sizes = (ctypes.c_long(one) for one in (rows, words, width))
    ends = (pointer(packed), ctypes.c_long(each), ctypes.c_long(threads))
    library = chosen()
    assert library is not None
    library.mmft_loss(*(pointer(one) for one in tensors), *sizes, *ends)
    return terms, hits
