"""Counts of n-grams, shared by BLEU and CIDEr."""

from __future__ import annotations

from collections import Counter

ORDER = 4
Ngram = tuple[str, ...]


def count_ngrams(words: list[str]) -> Counter[Ngram]:
    """How often each 1- to 4-gram occurs in `words`."""
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, ORDER + 1)
        for start in range(max(0, len(words) - size + 1))
    )
