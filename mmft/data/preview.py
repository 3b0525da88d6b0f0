"""A page of what the model is really trained on: the picture it gets, every token, the trained ones in green."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
import torch
from PIL import Image

from mmft.data.media import open_image
from mmft.data.render import IGNORED, Rendered, media_token_ids
from mmft.data.sample import Sample
from mmft.files import write_text

_SIDE = 384


class RendersRows(Protocol):
    """What the page asks of a renderer."""

    max_image_pixels: int

    def render(self, sample: Sample) -> Rendered:
        """One row as tensors."""
        ...


@dataclass(frozen=True)
class Chip:
    """One token as shown, or a run of media tokens."""

    text: str
    kind: str
    title: str


def write_preview(
    samples: Sequence[Sample],
    renderer: RendersRows,
    processor: Any,
    path: str | Path,
    *,
    rows: int = 8,
    lines: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write a self-contained HTML page of the first `rows` samples and return its path; `lines` tell of the forwards of
    the first step where rows are packed (`ids`, `tokens`, `alone`, `shared`).

    All that comes from rows is escaped. Raises the DataError of a row that cannot be rendered.
    """
    shown = []
    for sample in samples[:rows]:
        rendered = renderer.render(sample)
        shown.append(
            {
                "sample": sample,
                "rendered": rendered,
                "trained": int((rendered.labels != IGNORED).sum()),
                "pictures": [_inline(image) for image in _pictures(sample, rendered, renderer, processor)],
                "chips": chips(rendered, processor),
                "shapes": {name: tuple(value.shape) for name, value in rendered.media.items()},
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("preview.html.j2").render(rows=shown, total=len(samples), lines=lines)
    target = Path(path)
    write_text(target, page)
    return target


def chips(rendered: Rendered, processor: Any) -> list[Chip]:
    """The row token by token; runs of media tokens are one chip that counts them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    media = set(media_token_ids(processor).tolist())
    found: list[Chip] = []
    run = 0
    for token, label in zip([*rendered.input_ids.tolist(), None], [*rendered.labels.tolist(), IGNORED], strict=True):
        if token in media:
            run += 1
            continue
        if run:
            found.append(Chip(f"{run} image token{'s' if run > 1 else ''}", "media", "no loss"))
            run = 0
        if token is not None:
            text = tokenizer.decode([token]).replace("\n", "⏎\n")
            kind = "trained" if label != IGNORED else "plain"
            found.append(Chip(text, kind, f"id {token}"))
    return found


def _pictures(sample: Sample, rendered: Rendered, renderer: RendersRows, processor: Any) -> list[Image.Image]:
    """The pixels as the processor made them where they are one (3, H, W) per picture, else the RGB picture it got."""
    pixels = rendered.media.get("pixel_values")
    image_processor = getattr(processor, "image_processor", None)
    mean, std = (getattr(image_processor, name, None) for name in ("image_mean", "image_std"))
    plain = pixels is not None and pixels.dim() == 4 and pixels.shape[:2] == (len(sample.media), 3)
    if pixels is None or not plain:
        return [open_image(ref, max_pixels=renderer.max_image_pixels) for ref in sample.media if ref.kind == "image"]
    if getattr(image_processor, "do_normalize", False) and mean is not None and std is not None:
        pixels = pixels * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)
    bytes_ = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array) for array in bytes_]


def _inline(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
