"""A cell of a row becomes a `MediaRef`: looked up below its media root, or its encoded bytes; nothing is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmft.data.media import MAX_FILE_BYTES, frames_of, media_file
from mmft.data.sample import MediaKind, MediaRef
from mmft.data.sounds import encode_sound
from mmft.errors import DataError
from mmft.paths import located

_DATA_URL = re.compile(r"data:(image|audio|video)/[a-z0-9+.-]+(?:;[a-z0-9=.,+-]+)*;base64,", re.I)
_CALLED = {"image": "picture", "audio": "sound", "video": "video"}
MOST_FRAMES_LISTED = 10_000


def media_reference(value: Any, root: Path, where: str, kind: MediaKind = "image") -> MediaRef:
    """A reference to a medium that exists: a path below `root` (looked up, not opened), or encoded bytes.

    Taken are paths, bytes, `{"bytes", "path"}`, data: URIs, PIL pictures and arrays of uint8, `{"array",
    "sampling_rate"}` sounds, and for a video lists of pictures. Raises DataError with `where` for anything else.
    """
    called = _CALLED[kind]
    if isinstance(value, MediaRef):  # of a reader of ours; no file can hold one
        if value.kind != kind:
            raise DataError(f"a {value.kind} stands where a {called} belongs", where=where)
        return value
    if kind == "video" and isinstance(value, list | tuple):
        if not 0 < len(value) <= MOST_FRAMES_LISTED:
            raise DataError(f"the video has {len(value)} frames", where=where, allowed=f"1 to {MOST_FRAMES_LISTED}")
        return MediaRef("video", frames=tuple(media_reference(one, root, where) for one in value))
    if kind == "audio" and isinstance(value, Mapping) and value.get("array") is not None:
        value = encode_sound(value, where=where)
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if kind == "image":
        value = _encoded(value)
    if isinstance(value, str) and (match := _DATA_URL.match(value)):
        if match[1].lower() != kind:
            raise DataError(f"a data: URI of {match[1]} stands where a {called} belongs", where=where)
        try:
            value = base64.b64decode(value[match.end() :], validate=True)
        except binascii.Error as error:
            raise DataError(f"the {called}'s base64 text is broken: {error}", where=where) from error
    if isinstance(value, bytes | bytearray):
        if not 0 < len(value) <= MAX_FILE_BYTES:
            size = f"has {len(value)} bytes" if value else "is empty (0 bytes)"
            raise DataError(f"the {called} {size}", where=where, allowed=f"1 to {MAX_FILE_BYTES} bytes")
        return MediaRef(kind, data=bytes(value))
    if not isinstance(value, str):
        what = "missing" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{'an' if kind != 'video' else 'a'} {kind} is {what}", where=where, allowed="a path or encoded bytes"
        )
    ref = MediaRef(kind, path=value, root=root)
    if kind == "video" and located(Path(root), value).is_dir():
        frames_of(ref)
    elif media_file(ref).stat().st_size == 0:
        raise DataError(f"the {called} '{value}' is empty (0 bytes)", where=where)
    return ref


def _encoded(value: Any) -> Any:
    """A picture in memory as PNG, which keeps its values; anything else as it is."""
    if (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and (value.ndim == 2 or value.shape[2:] in ((3,), (4,)))
    ):
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    (value if value.mode in ("1", "L", "P", "RGB", "RGBA", "I;16") else value.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()
