"""Line and bar charts as SVG text, styled by the page they stand in (see `report.STYLE`)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 32
MOST_POINTS = 600
COLORS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")


@dataclass(frozen=True)
class Series:
    """One line: (x, y) points in order of x, y None or not finite where nothing is known."""

    name: str
    points: Sequence[tuple[float, float | None]]
    faint: bool = False

    def known(self) -> list[tuple[float, float]]:
        """The points that can be drawn, averaged in groups where there are very many."""
        points = [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]
        size = -(-len(points) // MOST_POINTS) or 1
        groups = (points[i : i + size] for i in range(0, len(points), size))
        return [tuple(sum(v) / len(v) for v in zip(*group, strict=True)) for group in groups]


def chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """An SVG element with axes, a legend when there are several lines, and the lines.

    Series without a point are left out; a single point is drawn as a dot.
    """
    lines = [(s, points) for s in series if (points := s.known())]
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{LEFT}" y="14">{html.escape(title)}</text>'
    )
    if not lines:
        return f'{head}<text x="{LEFT}" y="{HEIGHT / 2:g}">not known</text></svg>'
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    x_ticks = [x for x in x_ticks if min(xs) <= x <= max(xs)] or [min(xs)]
    x_range, y_range = (min(xs), max(xs)), (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1)
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [head]
    for y in y_ticks:
        _, at = place(x_range[0], y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in x_ticks:
        at, _ = place(x, y_range[0])
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{x:.6g}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 2}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    legend_at = LEFT
    for i, (one, points) in enumerate(lines):
        color, faint = COLORS[i % len(COLORS)], ' class="faint"' if one.faint else ""
        placed = [place(x, y) for x, y in points]
        if len(placed) == 1:
            (x, y), *_ = placed
            parts.append(f'<circle{faint} cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>')
        else:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline{faint} stroke="{color}" points="{text}"/>')
        if len(lines) > 1:
            parts.append(
                f'<rect x="{legend_at}" y="21" width="9" height="9" fill="{color}"{faint}/>'
                f'<text x="{legend_at + 13}" y="29">{html.escape(one.name)}</text>'
            )
            legend_at += 30 + 6 * len(one.name)
    return "".join([*parts, "</svg>"])


def bars(title: str, labels: Sequence[str], values: Sequence[float | None]) -> str:
    """An SVG element with a bar for each value; None leaves its place empty.

    Args:
        title: above the bars.
        labels: below them, one each.
        values: heights, from 0.
    """
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="{LEFT}" y="14">{html.escape(title)}</text>'
    )
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return f'{head}<text x="{LEFT}" y="{HEIGHT / 2:g}">not known</text></svg>'
    marks = ticks(0.0, max(known) or 1.0, 5)
    room, bottom = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = [head]
    for mark in marks:
        at = bottom - mark / marks[-1] * room
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{mark:.4g}</text>'
        )
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = LEFT + i * step
        middle = x + step / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{HEIGHT - 16}" text-anchor="middle">'
            f"{html.escape(label)}</text>"
        )
        if value is not None and math.isfinite(value):
            height = value / marks[-1] * room
            parts.append(
                f'<rect x="{x + 2:.1f}" y="{bottom - height:.1f}" width="{step - 4:.1f}" '
                f'height="{height:.1f}" fill="{COLORS[0]}"><title>{value:.5g}</title></rect>'
            )
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`."""
    if high == low:
        # A constant: a scale around it whose width belongs to its size.
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
