"""A `MediaRef` becomes an RGB picture: header checked before anything is decoded, colours and rotation made plain.

Pictures are untrusted: they stay inside their root, formats are on a list, sizes are capped by the header, and
every way of being broken is a `DataError` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmft.data.sample import MediaRef
from mmft.errors import DataError, MmftError
from mmft.files import contained

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 256 * 1024 * 1024
_ROTATED = (5, 6, 7, 8)
_ORIENTATION = 0x0112


def media_name(ref: MediaRef) -> str:
    """How errors and reports call a medium."""
    if ref.path is not None:
        return str(Path(ref.root) / ref.path) if ref.root is not None else ref.path
    return f"{len(ref.data or b'')} bytes in the row"


def media_file(ref: MediaRef) -> Path:
    """The regular file a path reference names; DataError when it leaves its root or is no file."""
    if ref.path is None:
        raise ValueError("this medium has no file")
    if ref.root is None:
        raise DataError("a medium has a path but no root folder", where=ref.path, do="set media_root")
    return contained(Path(ref.root), ref.path)


def read_bytes(ref: MediaRef) -> bytes:
    """The encoded bytes. The file is opened without following a link or waiting for a pipe."""
    if ref.data is not None:
        return ref.data
    path = media_file(ref)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(
                    "the medium is not a regular file",
                    where=str(path),
                    do="copy the real file there, or remove the row",
                )
            if status.st_size > MAX_FILE_BYTES:
                raise DataError(
                    f"the file has {status.st_size} bytes",
                    where=str(path),
                    allowed=f"at most {MAX_FILE_BYTES} bytes",
                    do="scale the picture down, or remove the row",
                )
            return stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"the medium cannot be read: {error.strerror}",
            where=str(path),
            allowed="a regular file that this user may read",
            do="check the file's rights, replace it or remove the row",
        ) from error


def media_digest(ref: MediaRef) -> str:
    """sha256 of the encoded bytes."""
    return hashlib.sha256(read_bytes(ref)).hexdigest()


@contextmanager
def _header(ref: MediaRef, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with only its header read, after the checks of format and size."""
    name, data = media_name(ref), read_bytes(ref)
    if not data:
        raise DataError(
            "the picture is empty (0 bytes)",
            where=name,
            allowed=f"a whole picture: {', '.join(FORMATS)}",
            do="replace the file or remove the row",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning; ours below is the stricter check
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"the picture is {width} x {height} = {width * height} pixels",
                        where=name,
                        allowed=f"at most {max_pixels} pixels (data.max_image_pixels)",
                        do="scale it down, or raise data.max_image_pixels if you trust it",
                    )
                if width < 1 or height < 1:
                    raise DataError(
                        f"the picture is {width} x {height}",
                        where=name,
                        allowed="at least 1 x 1 pixels",
                        do="replace the file or remove the row",
                    )
                yield image
    except MmftError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            "not a picture that is read here", where=name, allowed=", ".join(FORMATS), do="convert it to PNG or JPEG"
        ) from error
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise DataError(
            f"the picture cannot be decoded: {type(error).__name__}: {error}",
            where=name,
            allowed=f"a whole picture: {', '.join(FORMATS)}",
            do="replace the file or remove the row",
        ) from error


def image_size(ref: MediaRef, *, max_pixels: int) -> tuple[int, int]:
    """(width, height) as `open_image` will return it, from the header alone."""
    with _header(ref, max_pixels) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _ROTATED else (width, height)


def open_image(ref: MediaRef, *, max_pixels: int) -> Image.Image:
    """The picture as 8-bit RGB, upright by its EXIF orientation, alpha composited on white, first frame only.

    Raises DataError (with the file's name) when the file leaves its root, is no listed format, has more pixels than
    `max_pixels` (before decoding), is truncated or corrupt.
    """
    with _header(ref, max_pixels) as image:
        image.load()
        upright = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
        return _rgb(upright)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled by 257 (Pillow's own convert would clip at 255); other ranges by their maximum."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        top = max(float(values.max()), 1.0)
    else:
        top = 65535.0 if float(values.max()) > 255.0 or image.mode.startswith("I;16") else 255.0
    grey = np.clip(np.rint(values / top * 255.0), 0, 255).astype(np.uint8)
    return Image.fromarray(grey, mode="L").convert("RGB")
