"""VQA accuracy (Antol et al. 2015): an answer is right as far as three of ten people gave it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmft.evaluation.metrics.base import RowMetric, check_rows

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset({"a", "an", "the"})
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_POINT = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")

# Correct spellings; the misspellings that lack an apostrophe follow from them. Words that are English without the
# apostrophe as well (its, well, were, shed, ill, id, lets) are not in the list.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings(word: str) -> list[str]:
    """`word` with one of its apostrophes left out: dont; couldnt've, couldn'tve."""
    return [word[:at] + word[at + 1 :] for at, char in enumerate(word) if char == "'"]


_RESTORED = {wrong: word for word in _CONTRACTIONS.split() for wrong in _misspellings(word)}


def _without_marks(text: str) -> str:
    """Drop punctuation: beside a space a mark vanishes, between letters it becomes a space."""
    glue = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if glue or f"{mark} " in text or f" {mark}" in text else " ")
    return _POINT.sub("", out)


def normalize(text: str) -> str:
    """The official order: punctuation, lower case, number words to digits, articles dropped, apostrophes restored."""
    text = _without_marks(text.replace("\u2019", "'").replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """Mean over the references, each left out in turn, of `min(1, matches among the others / 3)`.

    With ten references m of which match: (m min(1, (m-1)/3) + (10-m) min(1, m/3)) / 10. With fewer than four
    references the 3 becomes the number of others; a single reference is matched plainly. Both sides are always
    normalized (the official script leaves references alone when all ten are the same string).
    """
    answer, count = normalize(prediction), len(references)
    matches = sum(normalize(reference) == answer for reference in references)
    if count == 1:
        return float(matches)
    needed = min(3, count - 1)
    return (matches * min(1.0, (matches - 1) / needed) + (count - matches) * min(1.0, matches / needed)) / count


class VqaAccuracy(RowMetric):
    """Mean over rows of the VQA accuracy."""

    name = "vqa_accuracy"

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 1) in [0, 1]."""
        check_rows(self.name, predictions, references)
        values = [accuracy(one, row) for one, row in zip(predictions, references, strict=True)]
        return np.asarray(values, dtype=np.float64).reshape(-1, 1)
