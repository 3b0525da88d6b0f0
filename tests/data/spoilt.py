"""A made data set of which some rows are spoilt, each in one of twenty ways; also a script for a set of any size."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.test_tables import wav

SIDE = 48


def picture(seed: int) -> Image.Image:
    """Patches of colour, of which no two pictures have the same."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells, "RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def row(image: str | None, question: str, answer: str = "a thing") -> dict:
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": question}]
    found = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}
    return found | ({"images": [image]} if image else {})


def bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    data = zlib.compress(b"\0" * 1000)
    body = b"IDAT" + data
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body)) + end
    )  # fmt: skip


def animated(seed: int) -> bytes:
    return encoded(picture(seed), "GIF", save_all=True, append_images=[picture(seed + 1), picture(seed + 2)])


def alpha(seed: int) -> bytes:
    image = picture(seed).convert("RGBA")
    image.putalpha(128)
    return encoded(image)


def rotated(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(seed), "JPEG", exif=exif)


def sixteen(seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    return encoded(Image.fromarray(values))


IMAGES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "corrupt_image": ("png", lambda seed: b"\x89PNG\r\n\x1a\n" + bytes(np.random.default_rng(seed).bytes(200))),
    "truncated": ("jpg", lambda seed: encoded(picture(seed), "JPEG")[:-400]),
    "animated": ("gif", animated),
    "cmyk": ("jpg", lambda seed: encoded(picture(seed).convert("CMYK"), "JPEG")),
    "sixteen_bit": ("png", sixteen),
    "alpha": ("png", alpha),
    "rotated": ("jpg", rotated),
    "bomb": ("png", lambda seed: bomb()),
}
OTHERS = (
    "json", "missing_file", "silent", "too_long_media", "video", "placeholders", "role_order", "empty_answer",
    "over_long", "duplicate", "leak", "outside",
)  # fmt: skip
KINDS = (*IMAGES, *OTHERS)


def make(folder: Path, *, rows: int, of_each: int) -> dict[int, str]:
    """Write train.jsonl (`rows` lines) and eval.jsonl (20) with their media; line -> cause of those that are spoilt."""
    (folder / "m").mkdir(parents=True, exist_ok=True)

    def kept(name: str, data: bytes) -> str:
        (folder / "m" / name).write_bytes(data)
        return f"m/{name}"

    held = [row(kept(f"e{k}.png", encoded(picture(10**6 + k))), f"evaluation {k}") for k in range(20)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in held))
    kept("silent.wav", wav(np.zeros((800, 1))))
    kept("long.wav", wav(np.full((601 * 1000, 1), 0.25), rate=1000, width=1))
    kept("broken.mp4", b"\0\0\0\x18ftypmp42" + b"x" * 500)
    (folder.parent / "outside.png").write_bytes(encoded(picture(5)))
    places = np.random.default_rng(0).permutation(np.arange(1, rows))[: of_each * len(KINDS)]
    causes = {int(line): KINDS[at % len(KINDS)] for at, line in enumerate(places)}
    lines: list[str] = []
    good: list[str] = []
    for line in range(rows):
        cause = causes.get(line)
        text = f"question {line}"
        if cause is None:
            lines.append(json.dumps(row(kept(f"{line}.png", encoded(picture(line))) if line % 4 else None, text)))
            good.append(lines[-1])
        elif cause in IMAGES:
            form, made = IMAGES[cause]
            lines.append(json.dumps(row(kept(f"{line}.{form}", made(line)), text)))
        else:
            lines.append(_other(cause, line, text, good, held, kept))
    (folder / "train.jsonl").write_text("".join(one + "\n" for one in lines))
    return {line + 1: cause for line, cause in causes.items()}


def _other(cause: str, line: int, text: str, good: list[str], held: list[dict], kept) -> str:
    plain = row(None, text)
    medium = {"silent": "audio", "too_long_media": "audio", "video": "video"}.get(cause)
    if cause == "json":
        return json.dumps(plain)[:-7]
    if cause == "missing_file":
        return json.dumps(row(f"m/gone{line}.png", text))
    if cause == "outside":
        return json.dumps(row("../outside.png", text))
    if medium:
        name = {"silent": "silent.wav", "too_long_media": "long.wav", "video": "broken.mp4"}[cause]
        plain["messages"][0]["content"].insert(0, {"type": medium, medium: f"m/{name}"})
    if cause == "placeholders":
        plain["images"] = ["m/e0.png"]
    if cause == "role_order":
        plain["messages"].reverse()
    if cause == "empty_answer":
        plain["messages"][1]["content"] = " "
    if cause == "over_long":
        plain["messages"][0]["content"][0]["text"] = text + " word" * 3000
    if cause == "duplicate":
        return good[line % len(good)]
    if cause == "leak":  # every other one compressed again: the bytes differ, the looks do not
        found = json.loads(json.dumps(held[line % len(held)]))
        if line % 2:
            found["images"] = [kept(f"leak{line}.jpg", encoded(picture(10**6 + line % len(held)), "JPEG", quality=90))]
        found["messages"][1]["content"] = f"another answer {line}"
        return json.dumps(found)
    return json.dumps(plain)


if __name__ == "__main__":
    total = int(sys.argv[2])
    sys.stdout.write(json.dumps(make(Path(sys.argv[1]), rows=total, of_each=total // 2000)) + "\n")
