"""Short names for what can be wrong with a row, told from the reason's words; `mmft check` counts by them."""

from __future__ import annotations

import re

_CAUSES: tuple[tuple[str, str], ...] = (
    ("json", r"broken JSON|half a surrogate|not UTF-8|the row is a |the row has not \d+ fields|the line is "),
    ("placeholders", r"placeholder\(s\) but|one medium in a pair|pictures?' in a pair"),
    ("role_order", r"turn \d+ is |the last turn is not|stands in a \w+ turn|\.(role|from)` is "),
    (
        "empty_answer",
        r"an answer is empty|a caption is (empty|missing)|list of answers is empty|label is empty"
        r"|an answer is (nan|inf|-inf)",
    ),
    (
        "missing_file",
        r"does not exist|^path .* cannot be resolved|the row has no picture|an? (image|audio|video) is missing",
    ),
    (
        "outside",
        r"^path .*(climbs out|leads outside|is a URL|is not a plain path|NUL|is not a path|regular file)",
    ),
    ("bomb", r"DecompressionBomb|the picture is \d+ x \d+ = |the frames are \d+ x|has \d+ bytes|more than \d+ frames"),
    ("truncated", r"truncated|Truncated|unexpected end|is empty \(0 bytes\)|has no samples"),
    ("silent", r"the sound is silent"),
    ("too_long_media", r"lasts .* s or more|the video has .* s$"),
    ("video", r"not a video|the video |holds no pictures|the file has no pictures|it has no frames"),
    ("audio", r"the sound |samples without a rate|a sound of shape|the samples are no numbers"),
    ("corrupt_image", r"the picture cannot be decoded|not a picture|the picture's base64|cannot be read"),
    ("turn_tokens", r"begins or ends a turn of this model"),
    ("masked", r"no token of the row carries loss"),
    ("over_long", r"the row has \d+ tokens|the texts have \d+ characters|a \w+ has \d+ characters"),
    ("duplicate", r"is the same as|was given before"),
    ("leak", r"is also in the evaluation set"),
    ("animated", r"^the picture is animated"),
    ("cmyk", r"^the picture is (CMYK|YCbCr|LAB|HSV)"),
    ("sixteen_bit", r"^the picture has more than 8 bits"),
    ("alpha", r"^the picture has an alpha channel"),
    ("rotated", r"^the picture is turned by its EXIF"),
    ("processor", r"the processor refused|takes no "),
)
_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _CAUSES)
CAUSES = (*(name for name, _ in _CAUSES), "other")


def cause_of(reason: str) -> str:
    """The name of a reason; `other` for one that is not on the list (a row of the wrong shape, say)."""
    return next((name for name, pattern in _PATTERNS if pattern.search(reason)), "other")
