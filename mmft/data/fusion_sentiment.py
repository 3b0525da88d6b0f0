"""Short spoken messages -> negative, neutral or positive: the words, the face sent along and the tone of the voice.

The three draw their valence from -1, 0, 1 apart from each other, and the label is the sign of the sum, so that no one
of them tells more than five rows in nine. Words and faces of the test do not occur in training. The tone is speed and
pitch (Pico's voices know no emotion): a stand-in for real prosody.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmft.data import emoji
from mmft.data.fusion_emoji import picture
from mmft.data.pairs_emoji import emoji_rows
from mmft.data.speech import VOICES, speak, with_noise
from mmft.seeds import fold

ROWS = {"train": 1500, "test": 600}
LABELS = {-1: "negative", 0: "neutral", 1: "positive"}
_WORDS: dict[str, dict[int, tuple[str, ...]]] = {
    "train": {
        1: ("wonderful", "lovely", "great", "excellent", "delightful", "fantastic", "superb", "brilliant", "charming"),
        0: ("usual", "normal", "regular", "average", "typical", "standard", "common", "plain", "ordinary"),
        -1: ("terrible", "awful", "horrible", "dreadful", "disgusting", "miserable", "hopeless", "rotten", "nasty"),
    },
    "test": {
        1: ("marvelous", "amazing", "beautiful", "splendid", "enjoyable"),
        0: ("medium", "moderate", "routine", "conventional", "unremarkable"),
        -1: ("appalling", "disappointing", "painful", "ghastly", "ugly"),
    },
}
_THINGS = {
    "train": ("hotel", "meal", "concert", "journey", "film", "lesson", "game", "party", "book", "service", "shop"),
    "test": ("flight", "dinner", "museum", "weather", "phone"),
}
_FRAMES = {
    "train": ("the {thing} was {word}", "what a {word} {thing}", "I found the {thing} {word}"),
    "test": ("that {thing} is really {word}", "they had a {word} {thing}"),
}
_FACES = {
    1: ("face-smiling", "face-affection"),
    0: ("face-neutral-skeptical", "face-sleepy"),
    -1: ("face-concerned", "face-negative", "face-unwell"),
}
_TONES = {1: (1.2, 1.3), 0: (1.0, 1.0), -1: (0.8, 0.75)}
"""Speed and pitch."""


def rows(part: str) -> Iterator[dict[str, Any]]:
    """Rows with `image`, `text`, `audio`, `label`, and in `agreement` whether the three say the same."""
    faces = {valence: _faces(kinds, part) for valence, kinds in _FACES.items()}
    for number in range(ROWS[part]):
        rng = np.random.Generator(np.random.PCG64(fold(0, "fusion-sentiment", part, number)))
        words, face, voice = (int(value) for value in rng.integers(-1, 2, 3))
        sentence = _pick(_FRAMES[part], rng).format(
            thing=_pick(_THINGS[part], rng), word=_pick(_WORDS[part][words], rng)
        )
        style = _pick(emoji.STYLES, rng)
        speed, pitch = _TONES[voice]
        spoken = speak(
            sentence,
            voice=_pick(VOICES, rng),
            speed=speed * rng.uniform(0.95, 1.05),
            pitch=pitch * rng.uniform(0.95, 1.05),
        )
        yield {
            "image": picture(emoji.art(style, _pick(faces[face], rng)[style]), rng, covered=False),
            "text": sentence,
            "audio": with_noise(spoken, 20.0, rng),
            "label": LABELS[int(np.sign(words + face + voice))],
            "agreement": "all agree" if words == face == voice else "they differ",
        }


def _pick(values: Any, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _faces(kinds: tuple[str, ...], part: str) -> list[dict[str, Any]]:
    """A quarter of the faces of each valence is for the test."""
    found = [row for row in emoji_rows() if row["subcategory"] in kinds]
    return [row for at, row in enumerate(found) if (at % 4 == 3) == (part == "test")]
