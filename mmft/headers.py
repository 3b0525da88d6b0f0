"""The header of a safetensors file before a library reads it: its length, which the file itself states."""

from __future__ import annotations

from pathlib import Path

MOST_HEADER = 32 * 1024 * 1024
"""Bytes; a shard of 100,000 tensors has half of it. A million names take more, and seconds and gigabytes to parse."""


def header_problem(path: Path) -> str | None:
    """What is wrong with the stated length of the header; None when nothing is (or the file cannot be read)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            stated = int.from_bytes(stream.read(8), "little")
    except OSError:
        return None
    if stated > MOST_HEADER:
        return f"it states a header of {stated:,} bytes, more than {MOST_HEADER:,}"
    if stated + 8 > size:
        return f"it states a header of {stated:,} bytes in a file of {size:,}"
    return None
