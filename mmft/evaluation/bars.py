"""Histograms and bars of counts as inline SVG, in the manner of `plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from mmft.evaluation.plots import number, ticks

_SIZE = (460, 230)
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 20, 10, 36
_BINS = 24
_ROW, _LABEL = 18, 190


def bins_of(values: Sequence[float], *, most: int = _BINS) -> tuple[list[int], list[float]]:
    """Counts and edges of equal bins; integers of a small range get a bin each."""
    low, high = min(values), max(values)
    whole = all(float(value).is_integer() for value in values)
    if whole and high - low < most:
        edges = np.arange(low - 0.5, high + 1.0)
    else:
        edges = np.linspace(low, high if high > low else low + 1, min(most, max(1, math.ceil(len(values) ** 0.5))) + 1)
    counts, found = np.histogram(values, bins=edges)
    return [int(count) for count in counts], [float(edge) for edge in found]


def histogram(values: Sequence[float], *, title: str, x_label: str) -> str:
    """How often values lie in each of up to 24 equal bins; "" with no values."""
    if not values:
        return ""
    counts, edges = bins_of(values)
    width, height = _SIZE
    across, up = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    top, low, span = max(counts), edges[0], edges[-1] - edges[0]
    parts = []
    for tick in ticks(0, top, count=4):
        y = _TOP + up * (1 - tick / top)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, number(tick), anchor="end"))
    for tick in ticks(low, edges[-1], count=6):
        parts.append(_text(_LEFT + across * (tick - low) / span, height - _BOTTOM + 17, number(tick), anchor="middle"))
    parts.append(_text(width - _RIGHT, height - 4, x_label, anchor="end"))
    for at, count in enumerate(counts):
        x, right = (_LEFT + across * (edge - low) / span for edge in edges[at : at + 2])
        tall = up * count / top
        hint = f"{number(edges[at])} to {number(edges[at + 1])}: {count}"
        parts.append(_bar(x, _TOP + up - tall, max(right - x - 1, 0.5), tall, hint))
    return _svg(parts, width=width, height=height, title=title)


def bars(counts: Mapping[str, int], *, title: str, most: int = 20) -> str:
    """The most frequent of some names, one bar each; "" with none."""
    chosen = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
    if not chosen:
        return ""
    width, height, top = _SIZE[0], 8 + _ROW * len(chosen), chosen[0][1]
    parts = []
    for at, (name, count) in enumerate(chosen):
        y = 4 + _ROW * at
        wide = (width - _LABEL - 60) * count / top
        short = name if len(name) <= 30 else name[:29] + "…"
        parts.append(_text(_LABEL - 8, y + 12, short, anchor="end"))
        parts.append(_bar(_LABEL, y + 2, max(wide, 0.5), _ROW - 5, f"{name}: {count}"))
        parts.append(_text(_LABEL + wide + 6, y + 12, str(count), anchor="start"))
    return _svg(parts, width=width, height=height, title=title)


def _bar(x: float, y: float, width: float, height: float, hint: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="bar" {place}><title>{escape(hint)}</title></rect>'


def _text(x: float, y: float, text: str, *, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], *, width: int, height: int, title: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"
