"""Charts as inline SVG: lines over steps, and bars over time. Colours are CSS classes, so that a page can be dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megabatch.insight.curves import Point, thinned
from megabatch.values import dataclass

WIDTH, HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 12, 10, 30
COLOURS = 8
"""Classes s0 to s7; later series cycle through them with other dashes."""
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart."""

    label: str
    index: int
    """Number of its run: decides colour and dashes."""
    points: Sequence[Point]
    dotted: bool = False
    """Draws a dot at each point, for few points far apart."""


def line_chart(series: Sequence[Series], *, title: str) -> str:
    """One SVG element with a text description for screen readers; empty when there is nothing to draw."""
    drawn = [one for one in series if one.points]
    if not drawn:
        return ""
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    horizontal, vertical = _Scale(x_ticks, _LEFT, WIDTH - _RIGHT), _Scale(y_ticks, HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x_ticks, y_ticks, horizontal, vertical)]
    parts += [_line(one, horizontal, vertical) for one in drawn]
    said = "; ".join(_described(one) for one in drawn)
    return _svg("".join(parts), title=title, description=said, height=HEIGHT)


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time in a row of a timeline."""

    row: int
    start: float
    end: float
    """Both in seconds since the same moment."""
    outcome: str
    """A CSS class: `done`, `saved`, `failed` or `running`."""
    label: str


def timeline(rows: Sequence[str], bars: Sequence[Bar], *, title: str) -> str:
    """Bars over hours since the first one began; `rows` are the runs' names."""
    if not bars:
        return ""
    height = _TOP + 26 * len(rows) + _BOTTOM
    first = min(bar.start for bar in bars)
    x_ticks = ticks(0, max(max(bar.end - first for bar in bars) / 3600, 1e-3))
    horizontal = _Scale(x_ticks, _LEFT, WIDTH - _RIGHT)
    parts = [
        f'<text x="{horizontal(x):.1f}" y="{height - 10}" class="t m">{number(x)}</text>'
        f'<line x1="{horizontal(x):.1f}" x2="{horizontal(x):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" class="g"/>'
        for x in x_ticks
    ]
    for row in range(len(rows)):
        parts.append(f'<text x="{_LEFT - 8}" y="{_TOP + 26 * row + 17}" class="t e">{row + 1}</text>')
    for bar in bars:
        left, right = (horizontal((moment - first) / 3600) for moment in (bar.start, bar.end))
        parts.append(
            f'<rect x="{left:.1f}" y="{_TOP + 26 * bar.row + 4}" width="{max(right - left, 2):.1f}" height="18" '
            f'rx="2" class="{escape(bar.outcome, quote=True)}"><title>{escape(bar.label)}</title></rect>'
        )
    said = "; ".join(bar.label for bar in bars[:40])
    return _svg("".join(parts), title=title, description=said, height=height)


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = (low - 1, high + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """Short, without the noise of binary fractions."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


class _Scale:
    """Maps values to positions, with the first and last tick at the ends."""

    def __init__(self, marks: Sequence[float], start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = marks[0], marks[-1], start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], horizontal: _Scale, vertical: _Scale) -> str:
    parts = []
    for x in x_ticks:
        parts.append(f'<text x="{horizontal(x):.1f}" y="{HEIGHT - 10}" class="t m">{number(x)}</text>')
    for y in y_ticks:
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{vertical(y):.1f}" y2="{vertical(y):.1f}" class="g"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{vertical(y) + 4:.1f}" class="t e">{number(y)}</text>')
    return "".join(parts)


def _line(one: Series, horizontal: _Scale, vertical: _Scale) -> str:
    places = [f"{horizontal(x):.1f},{vertical(y):.1f}" for x, y in thinned(one.points)]
    dashes = _DASHES[one.index // COLOURS % len(_DASHES)]
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    kind = f"s{one.index % COLOURS}"
    parts = [f'<polyline points="{" ".join(places)}" class="l {kind}"{style}/>']
    if one.dotted or len(places) == 1:
        parts += [f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" class="d {kind}"/>' for p in places]
    return "".join(parts)


def _described(one: Series) -> str:
    values = [y for _, y in one.points]
    return (
        f"{one.label}: from {number(values[0])} at step {number(one.points[0][0])} to {number(values[-1])} at step "
        f"{number(one.points[-1][0])}, lowest {number(min(values))}, highest {number(max(values))}"
    )


def _svg(inner: str, *, title: str, description: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{inner}</svg>"
    )
