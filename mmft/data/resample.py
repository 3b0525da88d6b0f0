"""Another sampling rate for a sound: polyphase filtering with a Kaiser-windowed sinc."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

ZEROS = 32
"""Zero crossings of the sinc on each side, at the lower of the two rates."""
ROLLOFF, BETA = 0.945, 10.0
"""The cutoff as a share of the lower Nyquist frequency; the window (about 100 dB of stop band)."""


@lru_cache(maxsize=16)
def low_pass(up: int, down: int) -> np.ndarray:
    """The filter's taps h at `up` times the input's rate, of odd length, their sum `up` (so that a constant stays)."""
    slow = max(up, down)
    at = np.arange(-ZEROS * slow, ZEROS * slow + 1)
    taps = np.sinc(at * ROLLOFF / slow) * np.kaiser(len(at), BETA)
    taps *= up / taps.sum()
    taps.setflags(write=False)
    return taps


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """`samples` (N,) at `rate` as float64 (ceil(N * wanted / rate),) at `wanted`.

    With up / down = wanted / rate in lowest terms: y[m] = sum_k h[m * down - k * up + len(h) // 2] x[k], x taken as 0
    outside; what `scipy.signal.resample_poly` computes with these taps. Each output takes len(h) / up products.
    """
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    if up == down or not len(samples):
        return np.asarray(samples, dtype=np.float64)
    taps, length = low_pass(up, down), -(-len(samples) * up // down)
    half = len(taps) // 2
    width = -(-len(taps) // up)  # inputs that one output sees
    left = width + 1
    padded = np.concatenate((np.zeros(left), samples, np.zeros(width + down + 1)))
    windows = sliding_window_view(padded, width)
    out = np.empty(length)
    for phase in range(min(up, length)):
        # h[m down + half - k up] is inside the filter for k from `first` on, newest input last.
        place = phase * down + half
        first = -(-(place - len(taps) + 1) // up)
        index = place - np.arange(first, first + width) * up
        weights = np.where(index >= 0, taps[np.maximum(index, 0)], 0.0)
        count = len(range(phase, length, up))
        start = first + left
        out[phase::up] = windows[start : start + (count - 1) * down + 1 : down] @ weights
    return out
