"""Lengths of many rows: those of one row at a time, taken once, in a fraction of the time; sizes from headers."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mmft.data import lengths
from mmft.data.augment import Augmentation
from mmft.data.lengths import lengths_of, row_lengths
from mmft.data.media import header, image_size
from mmft.data.packing import row_sizes
from mmft.data.quick_sizes import jpeg_size, png_size
from mmft.data.render import Renderer
from mmft.data.sample import MediaRef
from mmft.errors import DataError
from tests.data.small import encoded, picture, processor
from tests.data.test_render import KINDS, ROWS

LIMIT = 40_000_000


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(lengths, "_ROWS", 4)
    monkeypatch.setattr(lengths, "LOOKED_AT", 3)


def rows(count: int = 24) -> list:
    source = random.Random(0)
    found = [ROWS[source.choice(list(ROWS))]() for _ in range(count)]
    return [replace(row, id=str(number)) for number, row in enumerate(found)]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_one_row_at_a_time(kind):
    renderer, every = Renderer(processor(kind), max_length=4096), rows()
    seen = []
    found = row_lengths(renderer, every, progress=seen.append)
    assert found.tolist() == [list(Renderer(processor(kind), max_length=4096).sizes(row)) for row in every]
    assert lengths_of(renderer, every) == [len(renderer.render(row).input_ids) for row in every]
    assert sum(seen) == len(every) and not lengths._KNOWN[renderer].plain


def test_they_are_taken_once(monkeypatch):
    """By the check of lengths, by the plan of packs, and for rows whose pictures will be changed."""
    renderer, every = Renderer(processor("llava"), max_length=40), rows()
    first = row_lengths(renderer, every)
    monkeypatch.setattr(lengths._Short, "__call__", lambda *_: pytest.fail("a row was measured again"))
    monkeypatch.setattr(renderer, "sizes", lambda *_: pytest.fail("a row was measured again"))
    changed = [replace(row, augment=Augmentation.of({"rotate": 20.0}, seed=0)) for row in reversed(every)]
    assert np.array_equal(row_lengths(renderer, changed), first[::-1])
    sizes = row_sizes(renderer, every, only=[3, 5])
    assert sizes.tokens[[3, 5]].tolist() == np.minimum(first[[3, 5], 0], 40).tolist() and sizes.tokens.sum() > 0


def test_other_media_below_the_same_turns_are_other_rows():
    renderer, row = Renderer(processor("qwen2_vl"), max_length=4096), ROWS["one"]()
    wide = replace(row, media=(MediaRef(data=encoded(picture(size=(400, 40)))),))
    assert lengths_of(renderer, [row, wide, row]) == [renderer.length(one) for one in (row, wide, row)]
    assert renderer.length(row) != renderer.length(wide)


def test_a_processor_with_a_text_of_its_own_is_asked_for_every_row(monkeypatch):
    renderer, every = Renderer(processor("llava"), max_length=4096), rows()
    own = renderer.text
    monkeypatch.setattr(renderer, "text", lambda turns, prompt=False: own(turns, prompt).replace("cat", "a tiger cat"))
    assert lengths_of(renderer, every) == [renderer.length(row) for row in every]
    assert lengths._KNOWN[renderer].plain


def test_what_a_template_sets_for_a_row_is_gone_for_the_next(monkeypatch):
    """A template that says more where a variable of its own is known already, or where a message was changed."""
    renderer = Renderer(processor("llava"), max_length=4096)
    plain = getattr(renderer.processor, "chat_template", None) or renderer._chat_template
    seen = "{% if held is defined %}again and again{% endif %}{% set held = 1 %}" + plain
    monkeypatch.setattr(renderer.processor, "chat_template", seen)
    render, alone = lengths._template(renderer), Renderer(processor("llava"), max_length=4096)
    texts = [render(lengths.messages_of(row.turns)) for row in rows()]
    assert texts == [alone.text(row.turns) for row in rows()]


@pytest.mark.parametrize("lacks", ["template", "tokenizer"])
def test_where_the_short_way_is_not_to_be_had(monkeypatch, lacks):
    renderer, every = Renderer(processor("llava"), max_length=4096), rows()
    wanted = lengths_of(Renderer(processor("llava"), max_length=4096), every)
    if lacks == "tokenizer":
        cutting = SimpleNamespace(truncation={"max_length": 3}, padding=None, encode_batch_fast=None)
        monkeypatch.setattr(type(renderer.tokenizer), "backend_tokenizer", cutting)
    else:
        monkeypatch.setattr(renderer, "_chat_template", {"default": None})
        monkeypatch.setattr(renderer.processor, "chat_template", None)
    assert lengths._Short.of(renderer) is None
    monkeypatch.undo()
    monkeypatch.setattr(lengths._Short, "of", lambda *_: None)
    assert lengths_of(renderer, every) == wanted


def test_a_row_that_cannot_be_measured_is_named(tmp_path):
    every = rows()
    every[9] = replace(every[9], where="rows.jsonl:10", media=(MediaRef(path="gone.png", root=tmp_path),))
    with pytest.raises(DataError, match=r"rows\.jsonl:10"):
        lengths_of(Renderer(processor("llava"), max_length=4096), every)


# ---------------------------------------------------------------- sizes from headers


def files() -> dict[str, bytes]:
    """Pictures of many kinds, some of which say that they are turned."""
    image, found = Image.new("RGB", (6, 4), (9, 9, 200)), {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        found[f"png {mode}"] = encoded(image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode))
    for mode in ("L", "RGB", "CMYK"):
        found[f"jpeg {mode}"] = encoded(image.convert(mode), "JPEG")
    found["progressive"] = encoded(image, "JPEG", progressive=True)
    found["comment"] = encoded(image, "JPEG", comment=b"x" * 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    text, turned = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    text.add_text("Software", "a tool")
    turned.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    found |= {"png text": encoded(image, "PNG", pnginfo=text), "png xmp": encoded(image, "PNG", pnginfo=turned)}
    found |= {f"exif {kind}": encoded(image, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")}
    late = encoded(image, "PNG", exif=exif)  # the chunk may stand behind the pixels
    at = late.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(late[at : at + 4], "big")
    chunk, rest = late[at:end], late[:at] + late[end:]
    place = rest.index(b"IEND") - 4
    found["exif behind"] = rest[:place] + chunk + rest[place:]
    return found | {kind: encoded(image, kind) for kind in ("WEBP", "GIF", "BMP", "TIFF")}


def by_pillow(data: bytes) -> tuple[int, int]:
    with header(MediaRef(data=data), LIMIT) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112) in (5, 6, 7, 8) else (width, height)


@pytest.mark.parametrize("name", files())
def test_a_size_is_that_of_the_opened_picture(name):
    data = files()[name]
    quick = jpeg_size(data) if data[:2] == b"\xff\xd8" else png_size(data)
    assert image_size(MediaRef(data=data), max_pixels=LIMIT) == by_pillow(data)
    assert (quick is None) == (name not in plain_names()) and quick in (None, (6, 4))


def plain_names() -> set[str]:
    """Those that are told without Pillow."""
    modes = {f"png {mode}" for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "text")}
    return modes | {f"jpeg {mode}" for mode in ("L", "RGB", "CMYK")} | {"progressive", "comment"}


def test_damage_is_left_to_pillow_or_changes_nothing():
    """Cut at every byte, and with flipped bits: a size that is told is the one that Pillow tells."""
    source = np.random.default_rng(0)
    for name in ("png RGB", "jpeg RGB", "progressive", "png text"):
        clean = files()[name]
        damaged = [clean[:cut] for cut in range(len(clean))]
        for _ in range(300):
            data = bytearray(clean)
            for place in source.integers(2, len(data), 2):
                data[place] ^= 1 << int(source.integers(0, 8))
            damaged.append(bytes(data))
        for data in damaged:
            quick = jpeg_size(data) if data[:2] == b"\xff\xd8" else png_size(data)
            if quick is not None and min(quick) > 0:
                try:
                    with Image.open(io.BytesIO(data)) as image:
                        assert image.size == quick
                except (OSError, SyntaxError, ValueError):
                    continue  # told where the picture is opened
