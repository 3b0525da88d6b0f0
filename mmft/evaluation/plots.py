"""Charts as inline SVG text; colours come from the page's CSS, so one chart serves light, dark and print.

Every text that goes into a chart is escaped here; the results are safe to insert as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH = 760
_CURVE_SIZE = (460, 230)  # two stand side by side
_MAX_POINTS = 500
_LABEL = 190
_LANE = 15
_GAP = 12


@dataclass(frozen=True, slots=True)
class Mark:
    """One score with its interval."""

    series: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Lane:
    """One group of the forest chart: a label, a note (number of rows), and a mark per model."""

    label: str
    note: str
    marks: tuple[Mark, ...]
    heading: bool = False


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high], by steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: no trailing zeros, exponent only where it is shorter."""
    if value == 0:
        return "0"
    text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}" if exponent else text


def thin(points: Sequence[Point], *, limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each stretch the lowest and the highest, so that no spike disappears."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    out: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        out.extend(sorted(ends))
    return out


def line_chart(series: Mapping[str, Sequence[Point]], *, title: str, x_label: str = "step", log_y: bool = False) -> str:
    """Curves over steps; each series gets the CSS class `s-NAME`. Non-finite points are left out. "" with no points."""
    kept = {name: [point for point in points if _drawable(point, log_y)] for name, points in series.items()}
    kept = {name: thin(points) for name, points in kept.items() if points}
    if not kept:
        return ""
    width, height = _CURVE_SIZE
    left, right, top, bottom = 50, 20, 10, 36
    xs = [x for points in kept.values() for x, _ in points]
    ys = [_scale_y(y, log_y) for points in kept.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    y_low, y_high = (min(ys), max(ys)) if log_y else (min(0.0, min(ys)), max(ys))
    y_high = y_high if y_high > y_low else y_low + 1
    y_high += 0.05 * (y_high - y_low)

    def place(point: Point) -> str:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = top + (y_high - _scale_y(point[1], log_y)) / (y_high - y_low) * (height - top - bottom)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks(y_low, y_high, count=4):
        shown = 10.0**tick if log_y else tick
        x_y = place((x_low, shown)).split(",")
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{x_y[1]}" y2="{x_y[1]}"/>')
        parts.append(_text(left - 8, float(x_y[1]) + 4, number(shown), anchor="end"))
    for tick in ticks(x_low, x_high, count=6):
        x = float(place((tick, 10.0**y_low if log_y else y_low)).split(",")[0])
        parts.append(_text(x, height - bottom + 17, number(tick), anchor="middle"))
    parts.append(_text(width - right, height - 4, x_label, anchor="end", css="axis soft"))
    for name, points in kept.items():
        css = f"s-{_css(name)}"
        parts.append(f'<polyline class="curve {css}" points="{" ".join(place(point) for point in points)}"/>')
        if len(points) <= 40:
            parts.extend(
                _dot(place(point), css, f"{name}: {number(point[1])} at {number(point[0])}") for point in points
            )
    return _svg(parts, width=width, height=height, title=title)


def forest_chart(lanes: Sequence[Lane], *, title: str, series: Sequence[str]) -> str:
    """Scores with 95 % intervals, one lane per group and one row in it per series. "" with no lanes."""
    if not lanes:
        return ""
    marks = [mark for lane in lanes for mark in lane.marks]
    high = max([mark.high for mark in marks], default=1.0)
    # Shares keep their natural scale 0..1; CIDEr and its like take the scale of their values.
    high = 1.0 if high <= 1.0 else high * 1.05
    top, bottom, right = 8, 28, 18
    inner = _WIDTH - _LABEL - right

    def place(value: float) -> float:
        return _LABEL + min(max(value, 0.0), high) / high * inner

    parts: list[str] = []
    y = float(top)
    for lane in lanes:
        tall = 26 if lane.heading else _LANE * max(1, len(lane.marks)) + _GAP
        middle = y + tall / 2
        if lane.heading:
            parts.append(_text(0, y + 19, lane.label, css="axis head"))
        else:
            parts.append(_text(_LABEL - 14, middle - 1, _short(lane.label), anchor="end", css="axis name"))
            parts.append(_text(_LABEL - 14, middle + 12, lane.note, anchor="end", css="axis soft small"))
        for index, mark in enumerate(lane.marks):
            parts.extend(_mark(mark, y + _GAP / 2 + _LANE * (index + 0.5), place, series=series))
        y += tall
    grid = []
    for tick in ticks(0.0, high, count=5):
        x = place(tick)
        grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y:.1f}"/>')
        grid.append(_text(x, y + 18, number(tick), anchor="middle"))
    return _svg(grid + parts, width=_WIDTH, height=int(y + bottom), title=title)


def _mark(mark: Mark, y: float, place, *, series: Sequence[str]) -> list[str]:
    """The error bar, and a shape that tells the series apart without colour: circle, square, diamond."""
    css = f"s-{_css(mark.series)}"
    low, at, high = place(mark.low), place(mark.value), place(mark.high)
    hint = f"{mark.series}: {mark.value:.3f} ({mark.low:.3f} to {mark.high:.3f})"
    bar = (
        f'<path class="bar {css}" d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 3:.1f}v6M{high:.1f} {y - 3:.1f}v6"/>'
    )
    shape = series.index(mark.series) % 3 if mark.series in series else 0
    tip = f"<title>{escape(hint)}</title>"
    if shape == 0:
        return [bar, f'<circle class="dot {css}" cx="{at:.1f}" cy="{y:.1f}" r="4.2">{tip}</circle>']
    size, turn = (7.2, 0) if shape == 1 else (7.0, 45)
    spin = f' transform="rotate({turn} {at:.1f} {y:.1f})"' if turn else ""
    corner = f'x="{at - size / 2:.1f}" y="{y - size / 2:.1f}" width="{size}" height="{size}"'
    return [bar, f'<rect class="dot {css}" {corner}{spin}>{tip}</rect>']


def legend_shape(index: int, name: str) -> str:
    """The mark of a series for a legend, 14 x 14."""
    mark = Mark(name, 0.5, 0.5, 0.5)
    parts = _mark(mark, 7, lambda _: 7.0, series=[""] * index + [name])[1:]
    return f'<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{"".join(parts)}</svg>'


def _drawable(point: Point, log_y: bool) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1]) and (not log_y or point[1] > 0)


def _scale_y(value: float, log_y: bool) -> float:
    return math.log10(value) if log_y else value


def _css(name: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name)


def _short(text: str, limit: int = 26) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _dot(place: str, css: str, hint: str) -> str:
    x, y = place.split(",")
    return f'<circle class="dot {css}" cx="{x}" cy="{y}" r="2.6"><title>{escape(hint)}</title></circle>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "axis") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], *, width: int, height: int, title: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"
