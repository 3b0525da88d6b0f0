"""The heap kept small: oneDNN's caches of ready-made products bounded, tensors in blocks that fit again
(`native_blocks`), and what loading left behind given back before the first step.

For every shape a product is made by oneDNN once and kept twice: its description by torch's ideep (0.3 MB, the last
1,024) and its code by oneDNN (0.3 MB, the last 1,024). A step has some 40 shapes, others for every length of its rows,
so that a run of rows of unlike lengths grows by 20 MB a step up to 0.6 GB, and its blocks lie between the activations
where the heap cannot close up again. Kept here: `DESCRIPTIONS` and `PRODUCTS`, enough for some steps. Price:
0.6 ms for a product of a length that a longer memory would still have had; the numbers are the same products'.

Both are read from the environment at the first product of the process; what a user set stays. malloc's pages that the
proofs at the start left empty are given back.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace

from mmft.fast import native_blocks
from mmft.fast.native_build import NoKernels
from mmft.fast.plan import Candidate, Setting, Work
from mmft.fast.probe import on_cpu

PRODUCTS, DESCRIPTIONS = 128, 8
KEPT_BYTES = 300_000 * (PRODUCTS + DESCRIPTIONS)
"""What the bounded caches come to."""
BOUNDS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": PRODUCTS, "LRU_CACHE_CAPACITY": DESCRIPTIONS}


_KEEPS = f"the last {PRODUCTS} products are kept ready, not 1,024 (0.3 MB each, and their descriptions)"
_FIT = "tensors in blocks that fit again"


def holds(setting: Setting) -> tuple[bool, str]:
    """Unless the user bounded them."""
    set_ = [name for name, bound in BOUNDS.items() if os.environ.get(name, str(bound)) != str(bound)]
    if set_:
        return False, f"{' and '.join(set_)} is set"
    return True, f"{_KEEPS}; {native_blocks.why_not() or _FIT}" if on_cpu(setting) else _KEEPS


def saves(setting: Setting) -> str:
    """The most that the caches come to."""
    return "up to 0.6 GB where rows are of many lengths"


def bound() -> None:
    """Set the bounds, which the first product reads and which stay for the life of the process."""
    for name, most in BOUNDS.items():
        os.environ.setdefault(name, str(most))


def install(setting: Setting, work: Work) -> Work:
    """Bounds, and tensors in blocks that fit again where these can be had."""
    bound()
    if not on_cpu(setting):
        return work
    try:
        return replace(work, undo=(*work.undo, native_blocks.put_in()))
    except NoKernels as error:
        notes = {**work.notes, "kernel_caches": (f"{_KEEPS}; {error}", saves(setting))}
        return replace(work, notes=notes)


def give_back() -> None:
    """Return malloc's empty pages to the system (glibc; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


CANDIDATE = Candidate("kernel_caches", holds, saves, install, bits=False)
