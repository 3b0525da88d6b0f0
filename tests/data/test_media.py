"""Pictures: hostile ones are refused by their header, odd ones become plain RGB."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.data.media import image_size, media_digest, open_image
from mmft.data.sample import MediaRef
from mmft.errors import DataError
from tests.data.small import encoded, picture

LIMIT = 40_000_000


def opened(data: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return open_image(MediaRef(data=data), max_pixels=max_pixels)


def bomb(width: int, height: int) -> bytes:
    """A valid 1-bit PNG whose pixels are one deflated run of zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_bomb_is_refused_by_its_header():
    data = bomb(13_000, 13_000)
    assert len(data) < 60_000
    before, start = resident(), time.perf_counter()
    with pytest.raises(DataError, match="13000 x 13000 = 169000000 pixels") as caught:
        opened(data)
    assert time.perf_counter() - start < 0.05 * 10  # ten times the promise: the machine may be busy
    assert resident() - before < 50 * 2**20
    assert "max_image_pixels" in str(caught.value)
    with pytest.raises(DataError, match="pixels"):
        image_size(MediaRef(data=data), max_pixels=LIMIT)


def test_the_global_limit_of_pillow_is_not_touched():
    before = Image.MAX_IMAGE_PIXELS
    opened(encoded(picture()))
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_inclusive():
    assert opened(encoded(picture(size=(10, 8))), max_pixels=80).size == (10, 8)
    with pytest.raises(DataError):
        opened(encoded(picture(size=(10, 8))), max_pixels=79)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.05])
def test_truncated_pictures_are_refused_with_their_name(tmp_path, kind, share):
    data = encoded(picture(size=(64, 64)), kind)
    (tmp_path / "cut.bin").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="cut.bin"):
        open_image(MediaRef(path="cut.bin", root=tmp_path), max_pixels=LIMIT)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"P6 1 1 255 abc"]
)
def test_what_is_no_listed_picture_is_refused(data):
    with pytest.raises(DataError):
        opened(data)


def test_bit_flips_never_escape_as_other_errors():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        clean = encoded(picture(size=(24, 24)), kind)
        for _ in range(40):
            data = bytearray(clean)
            for place in rng.integers(0, len(data), 3):
                data[place] ^= 1 << int(rng.integers(0, 8))
            with contextlib.suppress(DataError):
                assert opened(bytes(data)).mode == "RGB"


def test_exif_rotation():
    image = picture(size=(6, 4))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(image, "PNG", exif=exif)
        shown = opened(data)
        assert shown.size == ((4, 6) if orientation >= 5 else (6, 4))
        assert image_size(MediaRef(data=data), max_pixels=LIMIT) == shown.size
        if orientation == 6:  # the camera was held with its right side up: turn clockwise
            assert np.array_equal(np.asarray(shown), np.rot90(np.asarray(image), -1))


def test_alpha_is_put_on_white():
    for mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (2, 1), (200, 200, 200, 0)).convert(mode)
        image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
        assert list(np.asarray(opened(encoded(image))).reshape(-1)) == [255, 255, 255, 0, 0, 0]


def test_half_transparent():
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert np.asarray(opened(encoded(image))).max() == pytest.approx(127, abs=1)


def test_palette_with_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    image.putpixel((1, 0), 1)
    shown = np.asarray(opened(encoded(image, "PNG", transparency=0)))
    assert shown.tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_rgb_with_a_transparent_colour():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert np.asarray(opened(encoded(image, "PNG", transparency=(1, 2, 3)))).tolist() == [[[255] * 3, [9] * 3]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    for kind in ("PNG", "TIFF"):
        assert np.asarray(opened(encoded(image, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_dark_sixteen_bits_stay_dark():
    assert np.asarray(opened(encoded(Image.fromarray(np.full((1, 1), 200, np.uint16))))).max() == 1


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(opened(encoded(image, "JPEG", quality=95)))[8, 8]
    assert red[0] > 230 and red[1] < 40 and red[2] < 40


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(opened(buffer.getvalue()))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(mode):
    assert np.asarray(opened(encoded(Image.new(mode, (2, 2), 255)))).tolist() == [[[255] * 3] * 2] * 2


def test_files_that_are_none(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(picture()))
    (root / "link.png").symlink_to(secret)
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    names = [
        "link.png",
        "pipe.png",
        "folder.png",
        "../secret.png",
        str(secret),
        "none.png",
        "http://x/a.png",
        "~/a.png",
    ]
    for name in names:
        start = time.perf_counter()
        with pytest.raises(DataError):
            open_image(MediaRef(path=name, root=root), max_pixels=LIMIT)
        assert time.perf_counter() - start < 1.0


def test_digest_is_of_the_bytes(tmp_path):
    import hashlib

    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    expected = hashlib.sha256(data).hexdigest()
    assert media_digest(MediaRef(path="a.png", root=tmp_path)) == media_digest(MediaRef(data=data)) == expected
