"""Charts as SVG text: bars, ribbons and a curve.

Colours are the page's CSS variables, so that a chart follows light and dark. Every chart has a
title and a description, and every bar and point its numbers, for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_BAR, _GAP, _LABEL, _VALUE = 14, 6, 300, 96
_WIDTH, _CURVE_HEIGHT = 760, 300
_PANEL_WIDTH, _PANEL_HEIGHT = 360, 170
_MARGIN = (44, 10, 26, 34)  # left, right, top, bottom


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        label: beside it.
        value: its length, above 0.
        kind: CSS class of its colour.
        note: said after the value.
    """

    label: str
    value: float
    kind: str
    note: str


def bars(title: str, description: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars on a logarithmic axis of whole decades."""
    values = [row.value for row in rows if row.value > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = max(low + 1, math.ceil(math.log10(max(values)))) if values else 1
    room = _WIDTH - _LABEL - _VALUE
    height = 24 + len(rows) * (_BAR + _GAP)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _LABEL + room * share

    parts = []
    for decade in range(low, high + 1):
        at = x(10.0**decade)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="{height}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="12" text-anchor="middle">{_power(decade)}</text>'
        )
    for i, row in enumerate(rows):
        top = 22 + i * (_BAR + _GAP)
        end = x(row.value) if row.value > 0 else float(_LABEL)
        text = f"{row.label}: {row.value:.2e}, {row.note}"
        parts.append(
            f"<g><title>{escape(text)}</title>"
            f'<text class="label" x="{_LABEL - 8}" y="{top + 11}" text-anchor="end">'
            f"{escape(_shorten(row.label))}</text>"
            f'<rect class="{row.kind}" x="{_LABEL}" y="{top}" width="{max(1.0, end - _LABEL):.1f}" '
            f'height="{_BAR}" rx="2"/>'
            f'<text class="value" x="{max(_LABEL + 1.0, end) + 6:.1f}" y="{top + 11}">'
            f"{row.value:.1e} {escape(row.note)}</text></g>"
        )
    return _svg(title, description, _WIDTH, height, parts)


@dataclass(frozen=True)
class Ribbon:
    """How a range moves over the steps of a run.

    Attributes:
        title: of the panel.
        low: smallest value of each step.
        high: largest.
        inner_low: lower end of what nearly all values lie in.
        inner_high: its upper end.
    """

    title: str
    low: Sequence[float]
    high: Sequence[float]
    inner_low: Sequence[float]
    inner_high: Sequence[float]


def ribbons(ribbon: Ribbon, ends: tuple[str, str]) -> str:
    """One panel: the whole range, and inside it that of nearly all values.

    Args:
        ribbon: at least one step.
        ends: what stands under the first and the last step.
    """
    left, right, top, bottom = _MARGIN
    count = len(ribbon.low)
    floor, ceiling = min(0.0, *ribbon.low), max(0.0, *ribbon.high)
    span = (ceiling - floor) or 1.0

    def x(i: int) -> float:
        return left + (_PANEL_WIDTH - left - right) * (i / max(1, count - 1))

    def y(value: float) -> float:
        return top + (_PANEL_HEIGHT - top - bottom) * (ceiling - value) / span

    def area(lower: Sequence[float], upper: Sequence[float], kind: str) -> str:
        forth = [f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(upper)]
        back = [f"{x(i):.1f},{y(v):.1f}" for i, v in reversed(list(enumerate(lower)))]
        return f'<polygon class="{kind}" points="{" ".join(forth + back)}"/>'

    ends_y = _PANEL_HEIGHT - 12
    parts = [f'<text class="panel" x="{left}" y="15">{escape(_shorten(ribbon.title))}</text>']
    for value in sorted({floor, 0.0, ceiling}):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{_PANEL_WIDTH - right}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/>'
            f'<text class="tick" x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{value:.3g}</text>"
        )
    parts.append(area(ribbon.low, ribbon.high, "outer"))
    parts.append(area(ribbon.inner_low, ribbon.inner_high, "inner"))
    parts.append(f'<text class="tick" x="{left}" y="{ends_y}">{escape(ends[0])}</text>')
    parts.append(
        f'<text class="tick" x="{_PANEL_WIDTH - right}" y="{ends_y}" text-anchor="end">'
        f"{escape(ends[1])}</text>"
    )
    description = (
        f"Range of the input of {ribbon.title} from the first to the last step: "
        f"{ribbon.low[0]:.3g} to {ribbon.high[0]:.3g}, then {ribbon.low[-1]:.3g} to "
        f"{ribbon.high[-1]:.3g}; widest {min(ribbon.low):.3g} to {max(ribbon.high):.3g}."
    )
    return _svg(ribbon.title, description, _PANEL_WIDTH, _PANEL_HEIGHT, parts)


def curve(
    title: str,
    points: Sequence[tuple[float, float]],
    axes: tuple[str, str],
    mark: tuple[float, float, str] | None,
) -> str:
    """Points joined by a line, the second coordinate on a logarithmic axis.

    Args:
        title: of the chart.
        points: (x, y) with y above 0, at least one.
        axes: names of x and y.
        mark: a point with its name; None for none.
    """
    plane = _Plane([*points, *([mark[:2]] if mark else [])])
    parts = plane.grid(axes[0])
    places = [plane.place(p) for p in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for (x, y), point in zip(places, points, strict=True):
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>'
            f"{escape(axes[0])} {point[0]:.3f}, {escape(axes[1])} {point[1]:.2e}</title></circle>"
        )
    if mark:
        x, y = plane.place(mark[:2])
        anchor = "end" if x > _WIDTH / 2 else "start"
        parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
            f'<text class="value" x="{x + (-10 if anchor == "end" else 10):.1f}" y="{y - 8:.1f}" '
            f'text-anchor="{anchor}">{escape(mark[2])}</text>'
        )
    first, last = points[0], points[-1]
    description = (
        f"{axes[1]} against {axes[0]}, {len(points)} points: from {first[1]:.2e} at {first[0]:.3f} "
        f"to {last[1]:.2e} at {last[0]:.3f}."
    )
    return _svg(title, description, _WIDTH, _CURVE_HEIGHT, parts)


class _Plane:
    """Where points lie: x linear between the outermost, y logarithmic over whole decades."""

    left, right, top, bottom = 62, 20, 16, 44

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        xs, ys = [p[0] for p in points], [math.log10(p[1]) for p in points]
        self.least, self.span = min(xs), (max(xs) - min(xs)) or 1.0
        self.low = math.floor(min(ys))
        self.high = max(self.low + 1, math.ceil(max(ys)))

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        """In the picture."""
        share = (math.log10(point[1]) - self.low) / (self.high - self.low)
        width = _WIDTH - self.left - self.right
        return (
            self.left + width * (point[0] - self.least) / self.span,
            _CURVE_HEIGHT - self.bottom - (_CURVE_HEIGHT - self.top - self.bottom) * share,
        )

    def grid(self, name: str) -> list[str]:
        """A line for every decade, numbers along x, and the name of x."""
        parts = []
        for decade in range(self.low, self.high + 1):
            y = self.place((self.least, 10.0**decade))[1]
            parts.append(
                f'<line class="grid" x1="{self.left}" x2="{_WIDTH - self.right}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
                f'<text class="tick" x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{_power(decade)}</text>"
            )
        for i in range(5):
            value = self.least + self.span * i / 4
            x = self.place((value, 10.0**self.low))[0]
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_CURVE_HEIGHT - self.bottom + 16}" '
                f'text-anchor="middle">{value:.2f}</text>'
            )
        parts.append(
            f'<text class="tick" x="{(self.left + _WIDTH) / 2:.0f}" y="{_CURVE_HEIGHT - 6}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
        return parts


def _svg(title: str, description: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _shorten(name: str, most: int = 46) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def _power(decade: int) -> str:
    return f'10<tspan dy="-4" font-size="8">{decade}</tspan>'
