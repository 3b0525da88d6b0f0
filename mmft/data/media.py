"""A `MediaRef` becomes bytes, and an RGB picture: header checked before decoding, colours and rotation made plain.

Media are untrusted: they stay inside their root, formats are on a list, sizes are capped by the header, and every way
of being broken is a `DataError` that names the file. Sounds and videos (`sounds.py`, `videos.py`) read through here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmft.data.quick_sizes import HEAD_BYTES, JPEG, PNG, jpeg_size, png_size
from mmft.data.sample import MediaKind, MediaRef
from mmft.errors import DataError, MmftError
from mmft.paths import contained, located

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 256 * 1024 * 1024
SUFFIXES: dict[MediaKind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
}
_ROTATED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_MAGIC: tuple[tuple[MediaKind, int, bytes], ...] = (
    ("image", 0, b"\x89PNG"),
    ("image", 0, b"\xff\xd8\xff"),
    ("image", 0, b"GIF8"),
    ("image", 0, b"BM"),
    ("image", 0, b"II*\0"),
    ("image", 0, b"MM\0*"),
    ("image", 8, b"WEBP"),
    ("audio", 8, b"WAVE"),
    ("audio", 0, b"fLaC"),
    ("audio", 0, b"OggS"),
    ("audio", 0, b"ID3"),
    ("audio", 0, b"\xff\xfb"),
    ("video", 8, b"AVI "),
    ("video", 4, b"ftyp"),
    ("video", 0, b"\x1aE\xdf\xa3"),
    ("video", 0, b"\0\0\1\xba"),
)


def kind_of_name(name: str) -> MediaKind | None:
    """What a file's ending says it is; None for none of the three."""
    return next((kind for kind, endings in SUFFIXES.items() if name.lower().endswith(endings)), None)


def kind_of_bytes(data: bytes) -> MediaKind | None:
    """What a file's first bytes say it is; None for none of the three."""
    return next((kind for kind, at, magic in _MAGIC if data[at : at + len(magic)] == magic), None)


def media_name(ref: MediaRef) -> str:
    """How errors and reports call a medium."""
    if ref.path is not None:
        member = f" at byte {ref.span[0]}" if ref.span is not None else ""
        return (str(Path(ref.root) / ref.path) if ref.root is not None else ref.path) + member
    return f"{len(ref.frames)} frames in the row" if ref.frames else f"{len(ref.data or b'')} bytes in the row"


def media_file(ref: MediaRef) -> Path:
    """The regular file a path reference names; DataError when it leaves its root or is no file."""
    if ref.path is None:
        raise ValueError("this medium has no file")
    if ref.root is None:
        raise DataError("a medium has a path but no root folder", where=ref.path, do="set media_root")
    return contained(Path(ref.root), ref.path)


@contextmanager
def open_bytes(ref: MediaRef) -> Iterator[BinaryIO]:
    """The encoded bytes as a stream. The file is opened without following a link or waiting for a pipe."""
    if ref.data is not None:
        yield io.BytesIO(ref.data)
        return
    path = media_file(ref)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                "the medium is not a regular file", where=str(path), do="copy the real file there, or remove the row"
            )
        if ref.span is not None:
            stream.seek(ref.span[0])
            yield io.BytesIO(stream.read(min(ref.span[1], MAX_FILE_BYTES)))
            return
        if status.st_size > MAX_FILE_BYTES:
            raise DataError(
                f"the file has {status.st_size} bytes",
                where=str(path),
                allowed=f"at most {MAX_FILE_BYTES} bytes",
                do="make the medium smaller, or remove the row",
            )
        yield stream


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the medium cannot be read: {error.strerror}",
        where=str(path),
        allowed="a regular file that this user may read",
        do="check the file's rights, replace it or remove the row",
    )


def read_bytes(ref: MediaRef) -> bytes:
    """The encoded bytes, at most `MAX_FILE_BYTES`."""
    with open_bytes(ref) as stream:
        try:
            size = stream.seek(0, io.SEEK_END)  # a buffer of the largest size would be asked for first otherwise
            stream.seek(0)
            return stream.read(min(size, MAX_FILE_BYTES) + 1)
        except OSError as error:
            raise _unreadable(media_file(ref), error) from error


def media_digest(ref: MediaRef) -> str:
    """sha256 of the encoded bytes; of a video of single frames, over their digests."""
    frames = frames_of(ref)
    if frames:
        return hashlib.sha256("".join(map(media_digest, frames)).encode()).hexdigest()
    return hashlib.sha256(read_bytes(ref)).hexdigest()


def frames_of(ref: MediaRef) -> tuple[MediaRef, ...]:
    """The pictures a video consists of when it is a list or a folder of them, a folder's in natural order of names;
    () for a file. Raises DataError for a path out of the root and for a folder without pictures."""
    if ref.frames or ref.kind != "video" or ref.path is None or ref.root is None or ref.span is not None:
        return ref.frames
    folder = located(Path(ref.root), ref.path)
    if not folder.is_dir():
        return ()
    names = [name for name in os.listdir(folder) if kind_of_name(name) == "image" and not name.startswith(".")]
    if not names:
        raise DataError("the folder holds no pictures", where=str(folder), do="give frames as 0001.png, 0002.png, ...")
    return tuple(MediaRef(path=f"{ref.path}/{name}", root=ref.root) for name in sorted(names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(parts)]


@contextmanager
def header(ref: MediaRef, max_pixels: int) -> Iterator[Image.Image]:
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
    with open_bytes(ref) as stream:
        size = _quick_size(stream)
    if size is not None and min(size) >= 1 and size[0] * size[1] <= max_pixels:
        return size
    with header(ref, max_pixels) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(_ORIENTATION) in _ROTATED else (width, height)


def _quick_size(stream: BinaryIO) -> tuple[int, int] | None:
    try:
        head = stream.read(HEAD_BYTES)
        if head.startswith(JPEG):
            return jpeg_size(head)
        return png_size(head + stream.read(MAX_FILE_BYTES)) if head.startswith(PNG) else None
    except OSError:
        return None  # told where the file is read as a whole


def picture_traits(ref: MediaRef, *, max_pixels: int) -> tuple[str, ...]:
    """What `open_image` changes in silence, from the header: frames, colours, depth, alpha or rotation lost."""
    found = []
    with header(ref, max_pixels) as image:
        if getattr(image, "n_frames", 1) > 1:
            found.append(f"the picture is animated ({image.n_frames} frames); the first one is taken")  # type: ignore[attr-defined]
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") and not (image.mode == "YCbCr" and image.format == "JPEG"):
            found.append(f"the picture is {image.mode}; it is converted to RGB")
        tiles = getattr(image, "tile", None)
        raw = str(tiles[0][3]) if tiles else ""  # 16-bit RGB comes as 8 bits from Pillow
        if image.mode.startswith("I;16") or image.mode in ("I", "F") or ";16" in raw:
            found.append(f"the picture has more than 8 bits a channel ({image.mode}); it is scaled to 8")
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            found.append("the picture has an alpha channel; it is put on white")
        if (turned := image.getexif().get(_ORIENTATION, 1)) != 1:
            found.append(f"the picture is turned by its EXIF orientation {turned}")
    return tuple(found)


def open_image(ref: MediaRef, *, max_pixels: int) -> Image.Image:
    """The picture as 8-bit RGB, upright by its EXIF orientation, alpha composited on white, first frame only; then
    the changes that the reference carries.

    Raises DataError (with the file's name) when the file leaves its root, is no listed format, has more pixels than
    `max_pixels` (before decoding), is truncated or corrupt.
    """
    with header(ref, max_pixels) as image:
        image.load()
        upright = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
        rgb = to_rgb(upright)
    return rgb if ref.drawn is None else ref.drawn.apply(rgb)


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded picture as 8-bit RGB, alpha composited on white."""
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
