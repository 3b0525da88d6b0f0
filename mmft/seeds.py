"""Every random draw of mmft starts here: `fold(seed, *keys)` names a draw, so its value needs no stored state.

A resumed, re-sharded or re-ordered run asks for the same name and gets the same number.
"""

from __future__ import annotations

import hashlib
import random


def fold(seed: int, *keys: int | str) -> int:
    """A 63-bit integer that is a pure function of `seed` and `keys` (BLAKE2b of their canonical text).

    Keys are typed: `fold(0, 1)` and `fold(0, "1")` differ, and so do `("ab", "c")` and `("a", "bc")`.
    """
    parts = [f"i{seed}"]
    for key in keys:
        text = f"i{int(key)}" if isinstance(key, int) else f"s{len(key)}:{key}"
        parts.append(text)
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *keys: int | str) -> random.Random:
    """A Python random generator for the draw named by `keys`."""
    return random.Random(fold(seed, *keys))
