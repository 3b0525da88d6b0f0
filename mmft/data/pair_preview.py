"""A page of pairs as a dual encoder gets them: the medium, every text with its tokens, wrong texts in red."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image

from mmft.data.pairs import PairRenderer
from mmft.data.sample import Sample
from mmft.files import write_text

_SIDE = 256


def write_pair_preview(samples: Sequence[Sample], renderer: PairRenderer, path: str | Path, *, rows: int = 8) -> Path:
    """Write a self-contained HTML page of the first `rows` samples and return its path.

    All that comes from rows is escaped. Raises the DataError of a row that cannot be read.
    """
    shown = []
    for sample in samples[:rows]:
        media = renderer.encode_media([sample])
        shown.append(
            {
                "sample": sample,
                "group": sample.tags.get("group"),
                "picture": _inline(_picture(media, renderer)) if renderer.medium == "image" else None,
                "shapes": {name: tuple(value.shape) for name, value in media.items()},
                "texts": [(text, "plain", _tokens(text, renderer)) for text in sample.answers]
                + [(text, "wrong", _tokens(text, renderer)) for text in sample.negatives],
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("pairs.html.j2").render(
        rows=shown, total=len(samples), captions=renderer.captions, longest=renderer.max_length
    )
    target = Path(path)
    write_text(target, page)
    return target


def _tokens(text: str, renderer: PairRenderer) -> list[str]:
    """The tokens that the text side sees, cut where it cuts them, without padding."""
    ids = renderer.tokenizer(text, truncation=True, max_length=renderer.max_length)["input_ids"]
    return [str(renderer.tokenizer.decode([token])) for token in ids]


def _picture(media: dict[str, torch.Tensor], renderer: PairRenderer) -> Image.Image:
    """The pixels as the processor made them, where they are one (1, 3, H, W); else a grey field of that many values."""
    pixels: Any = media.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or pixels.shape[1] != 3:
        return Image.new("RGB", (_SIDE, _SIDE), (200, 200, 200))
    mean, std = (getattr(renderer.image_processor, name, None) for name in ("image_mean", "image_std"))
    if getattr(renderer.image_processor, "do_normalize", False) and mean is not None and std is not None:
        pixels = pixels * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    array = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def _inline(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
