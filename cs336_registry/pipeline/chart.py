"""Charts as inline SVG, coloured by the page's style sheet so that they read in light and in dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
MOST_POINTS = 800
"""A curve with more points is averaged down to this many; a screen shows no more."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named curve. style: "line", "dashed", "dotted"; "faint" for the noise behind a line; "dots" for few points."""

    name: str
    points: Points
    color: int = 1
    style: str = "line"


@dataclass(frozen=True)
class Level:
    """A horizontal reference line."""

    name: str
    value: float


def line_chart(series: Sequence[Series], x_label: str, y_label: str, levels: Sequence[Level] = ()) -> str:
    """An SVG figure of the curves with axes; its numbers are embedded for the pointer's read-out."""
    drawn = [Series(one.name, thinned(one.points), one.color, one.style) for one in series if one.points]
    if not drawn:
        return '<p class="empty">Nothing was measured.</p>'
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + [level.value for level in levels]
    x_axis, y_axis = (
        _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT),
        _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, pad=0.04),
    )
    parts = [_y_grid(y_axis), _x_grid(x_axis)]
    parts += [_level(level, y_axis) for level in levels]
    parts += [_curve(one, x_axis, y_axis) for one in drawn]
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    read_out = {
        "x": x_label,
        "series": [
            {"name": one.name, "color": one.color, "points": [[round(x, 4), round(y, 5)] for x, y in one.points]}
            for one in drawn
            if one.style != "faint"
        ],
        "domain": [x_axis.low, x_axis.high],
    }
    return (
        f'<figure class="chart" data-chart="{escape(json.dumps(read_out), quote=True)}">'
        f"<figcaption>{escape(y_label)}{_legend(drawn)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">'
        f"{''.join(parts)}<line class='pointer' y1='{TOP}' y2='{HEIGHT - BOTTOM}' visibility='hidden'/></svg>"
        f"<output hidden></output></figure>"
    )


def bar_chart(bars: Sequence[tuple[str, float, int]], unit: str) -> str:
    """Horizontal bars of (name, value, color), longest first; color 0 is a bar to compare with."""
    longest = max(value for _, value, _ in bars)
    rows = [
        f'<div class="bar"><span class="name">{escape(name)}</span><span class="track">'
        f'<span class="fill c{color}" style="width:{100 * value / longest:.2f}%"></span></span>'
        f'<span class="value">{value:.3f}</span></div>'
        for name, value, color in sorted(bars, key=lambda bar: -bar[1])
    ]
    return f'<div class="bars" role="img" aria-label="{escape(unit)}">{"".join(rows)}</div>'


def smoothed(points: Points, share: float = 0.02) -> list[tuple[float, float]]:
    """An exponential average whose memory is `share` of the curve, without the bias towards the first value."""
    decay = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = decay * total + (1 - decay) * y, decay * weight + (1 - decay)
        found.append((x, total / weight))
    return found


def thinned(points: Points) -> list[tuple[float, float]]:
    """Neighbouring points averaged until there are at most MOST_POINTS."""
    group = math.ceil(len(points) / MOST_POINTS)
    if group <= 1:
        return list(points)
    blocks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in blocks]


class _Axis:
    """Maps values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, pad: float = 0.0) -> None:
        span = (high - low) or abs(high) or 1.0
        self.low, self.high = low - pad * span, (high if high > low else low + span) + pad * span
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers, about `count` of them."""
        rough = (self.high - self.low) / count
        magnitude = 10 ** math.floor(math.log10(rough))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _y_grid(axis: _Axis) -> str:
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis(tick):.1f}" y2="{axis(tick):.1f}"/>'
        + _text("tick", LEFT - 8, axis(tick) + 4, _number(tick), "end")
        for tick in axis.ticks(7)
    )


def _x_grid(axis: _Axis) -> str:
    return "".join(_text("tick", axis(tick), HEIGHT - BOTTOM + 17, _number(tick)) for tick in axis.ticks(6))


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _level(level: Level, axis: _Axis) -> str:
    y = axis(level.value)
    return f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>' + _text(
        "level", WIDTH - RIGHT - 2, y - 4, level.name, "end"
    )


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis(x), y_axis(y)) for x, y in series.points]
    path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in places)
    if series.style != "dots":
        return f'<path class="curve {series.style} c{series.color}" d="{path}"/>'
    dots = "".join(f'<circle class="dot c{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places)
    return f'<path class="curve joined c{series.color}" d="{path}"/>{dots}'


def _legend(series: Sequence[Series]) -> str:
    named = [one for one in series if one.style != "faint"]
    if len(named) < 2:
        return ""
    keys = "".join(f'<span class="key {one.style} c{one.color}">{escape(one.name)}</span>' for one in named)
    return f'<span class="legend">{keys}</span>'


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.0e}"
