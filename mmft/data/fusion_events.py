"""What happens before a camera: six frames, two seconds of sound and a line of the log -> one of eight events.

The event is what it is (vehicle or animal), whether it comes or goes, and whether there is an alarm. The frames show
the thing growing or shrinking, in fog half of the time; only their order tells coming from going. The sound is an alarm
or a calm hum, under wind. The log line names the thing in half of the rows, and else only time and place. Things of the
test (one in four) do not occur in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mmft.data import emoji
from mmft.data.pairs_emoji import emoji_rows
from mmft.data.speech import RATE, tone, with_noise
from mmft.seeds import fold

ROWS = {"train": 1200, "test": 480}
FRAMES, SIDE, SECONDS = 6, 96, 2
_KINDS = {
    "vehicle": ("transport-ground",),
    "animal": ("animal-mammal", "animal-bird", "animal-reptile"),
}
_NO_THING = frozenset(
    {
        "station",
        "mountain railway",
        "motorway",
        "horizontal traffic light",
        "vertical traffic light",
        "oil drum",
        "fuel pump",
        "roller skate",
        "feather",
        "wing",
        "paw prints",
        "pig nose",
        "hatching chick",
        "bus stop",
        "wheel",
        "police cars revolving light",
        "construction sign",
        "octagonal sign",
    }
)
"""Members of those groups that do not come and go."""
_PLACES = ("north gate", "south gate", "yard", "car park", "bridge", "field")


def rows(part: str) -> Iterator[dict[str, Any]]:
    """Rows with `frames`, `audio`, `text`, `label`, and in `weather` whether there is fog."""
    things = {kind: _things(groups, part) for kind, groups in _KINDS.items()}
    for number in range(ROWS[part]):
        rng = np.random.Generator(np.random.PCG64(fold(0, "fusion-events", part, number)))
        kind, comes, alarm = (bool(value) for value in rng.integers(0, 2, 3))
        name = ("vehicle", "animal")[kind]
        thing, style = things[name][rng.integers(len(things[name]))], emoji.STYLES[rng.integers(2)]
        fog = bool(rng.random() < 0.5)
        yield {
            "frames": frames(emoji.art(style, thing[style]), rng, comes=comes, fog=fog),
            "audio": sound(rng, alarm=alarm),
            "text": _line(thing["short"][0], rng, named=bool(rng.random() < 0.5)),
            "label": f"{name} {'comes' if comes else 'goes'}{', alarm' if alarm else ''}",
            "weather": "fog" if fog else "clear",
        }


def frames(art: Image.Image, rng: np.random.Generator, *, comes: bool, fog: bool) -> list[Image.Image]:
    """The thing at sizes that grow (or shrink) from frame to frame, on a ground of one colour."""
    ground = tuple(int(value) for value in rng.integers(120, 230, 3))
    sizes = np.linspace(rng.uniform(0.15, 0.3), rng.uniform(0.75, 0.95), FRAMES) * SIDE
    x, y = rng.uniform(0.35, 0.65, 2) * SIDE
    out = []
    for size in sizes if comes else sizes[::-1]:
        side = max(4, int(size))
        picture = Image.new("RGBA", (SIDE, SIDE), (*ground, 255))
        small = art.resize((side, side), Image.Resampling.BICUBIC)
        picture.alpha_composite(_inside(small, SIDE), (max(0, int(x - side / 2)), max(0, int(y - side / 2))))
        values = np.asarray(picture.convert("RGB"), dtype=np.float64)
        if fog:
            values = 0.25 * values + 0.75 * 200 + rng.normal(0, 12, values.shape)
        out.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)))
    return out


def _inside(picture: Image.Image, side: int) -> Image.Image:
    return picture.crop((0, 0, min(picture.width, side), min(picture.height, side)))


def sound(rng: np.random.Generator, *, alarm: bool) -> np.ndarray:
    """Two tones in turn, or a low hum, in wind 5 decibels above it."""
    time = np.arange(SECONDS * RATE) / RATE
    if alarm:
        low, rate = rng.uniform(600, 900), rng.uniform(1.5, 4)
        made = tone(np.where(np.sin(2 * np.pi * rate * time) > 0, low, low * rng.uniform(1.3, 1.6)))
    else:
        made = tone(rng.uniform(70, 140) + 10 * np.sin(2 * np.pi * rng.uniform(0.2, 1) * time))
    return with_noise(made, -5.0, rng)


def _line(name: str, rng: np.random.Generator, *, named: bool) -> str:
    place = _PLACES[rng.integers(len(_PLACES))]
    clock = f"{rng.integers(24):02d}:{rng.integers(60):02d}"
    return f"{clock} {place}, {name} seen" if named else f"{clock} {place}, movement"


def _things(groups: tuple[str, ...], part: str) -> list[dict[str, Any]]:
    found = [row for row in emoji_rows() if row["subcategory"] in groups and row["name"] not in _NO_THING]
    names = sorted({_plain(row) for row in found})
    return [row for row in found if (names.index(_plain(row)) % 4 == 3) == (part == "test")]


def _plain(row: dict[str, Any]) -> str:
    """The horse's face is a horse."""
    return str(row["name"]).removesuffix(" face")
