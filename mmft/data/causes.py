"""Short names for what can be wrong with a row, told from the reason's words; `mmft check` counts by them."""

from __future__ import annotations

import re
from collections.abc import Set

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


MADE_PLAIN = ("animated", "cmyk", "sixteen_bit", "alpha", "rotated")
"""Causes that do not stop a run: such pictures are opened as plain ones."""
_LENGTHS = "over_long"
_LOOKED_AT = ("duplicate", "leak", "turn_tokens", "masked", *MADE_PLAIN, _LENGTHS)
"""Causes of rows that a run can read."""


def remedies(causes: Set[str], *, held_out: bool, fixed: bool, recipe: bool) -> str:
    """What to do about bad training rows of these causes, and with `held_out` about bad evaluation rows; `fixed`: the
    clean sets are written, `recipe`: a recipe was looked at, whose fields can help."""
    found = []
    if causes:
        found.append("train on the files above" if fixed else "mend the rows, or --fix OUT writes those to train on")
        if plain := [cause for cause in MADE_PLAIN if cause in causes]:
            found.append(f"--allow {','.join(plain)} lets pictures pass that training opens as plain ones")
    if recipe and _LENGTHS in causes:
        found.append("raise data.max_length, or set data.over_length to drop, truncate_text or shrink_images")
    if recipe and not causes <= set(_LOOKED_AT):
        found.append("data.max_bad_fraction above 0 lets a run leave out rows it cannot read")
    if held_out:
        found.append("mend the rows of evaluation sets in their own files, which --fix does not write")
    return "; ".join(found)
