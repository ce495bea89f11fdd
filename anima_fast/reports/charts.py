"""Line and bar charts as SVG text, styled by the page they stand in (see `report.STYLE`)."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of a phone: letters have their size there, and three charts stand side by side at a desk.
WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 42, 34
ROW = 14
MOST_POINTS = 600
COLORS = tuple(f"var(--{letter})" for letter in "abcdef")


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


def chart(title: str, series: Sequence[Series], x_label: str = "step", zero: bool = False) -> str:
    """An SVG element with axes, a legend when there are several lines, and the lines.

    Series without a point are left out; a single point is drawn as a dot. The axis begins at 0 with
    `zero`, else near the lowest value.
    """
    lines = [(s, points) for s in series if (points := s.known())]
    if not lines:
        return _nothing(title)
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_marks = ticks(min(xs), max(xs), 5)
    # There is no half step.
    x_marks = [x for x in x_marks if min(xs) <= x <= max(xs) and x == int(x)] or [min(xs)]
    legend, rows = _legend([one for one, _ in lines]) if len(lines) > 1 else ([], 0)
    frame = _Frame(title, ticks(min(0, *ys) if zero else min(ys), max(ys), 5), max(0, rows - 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), frame.height_of(y)

    parts = [*frame.parts, *legend]
    parts += [frame.below(place(x, 0)[0], f"{x:.6g}") for x in x_marks]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{frame.bottom + 29}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    for i, (one, points) in enumerate(lines):
        color, faint = COLORS[i % len(COLORS)], ' class="faint"' if one.faint else ""
        placed = [place(x, y) for x, y in points]
        if len(placed) == 1:
            (x, y), *_ = placed
            parts.append(f'<circle{faint} cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>')
        else:
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline{faint} stroke="{color}" points="{text}"/>')
    return "".join([*parts, "</svg>"])


def bars(title: str, labels: Sequence[str], values: Sequence[float | None]) -> str:
    """An SVG element with a bar for each value; None leaves its place empty.

    Args:
        title: above the bars.
        labels: below them, one each.
        values: heights, from 0.
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return _nothing(title)
    frame = _Frame(title, ticks(0.0, max(known) or 1.0, 5))
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = [*frame.parts]
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = LEFT + i * step
        parts.append(frame.below(x + step / 2, label))
        if value is not None and math.isfinite(value):
            top = frame.height_of(value)
            parts.append(
                f'<rect x="{x + 2:.1f}" y="{top:.1f}" width="{step - 4:.1f}" '
                f'height="{frame.bottom - top:.1f}" fill="{COLORS[0]}">'
                f"<title>{value:.5g}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


class _Frame:
    """Title, lines and numbers of the vertical axis, and where a value stands.

    Args:
        title: above all.
        marks: of the axis, from its lowest value to its highest.
        extra_rows: of the legend, beyond its first.
    """

    def __init__(self, title: str, marks: Sequence[float], extra_rows: int = 0) -> None:
        self.low, self.high = marks[0], marks[-1]
        self.top = TOP + extra_rows * ROW
        height = HEIGHT + extra_rows * ROW
        self.bottom = height - BOTTOM
        self.parts = [_head(title, height)]
        for mark in marks:
            at, text = self.height_of(mark), axis_number(mark)
            self.parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
            )

    def height_of(self, value: float) -> float:
        """The y of a value."""
        up = (value - self.low) / (self.high - self.low)
        return self.bottom - up * (self.bottom - self.top)

    def below(self, x: float, text: str) -> str:
        """A number of the horizontal axis; the last one ends where the chart does."""
        anchor = "end" if x > WIDTH - 4 * len(text) else "middle"
        return (
            f'<text x="{x:.1f}" y="{self.bottom + 16}" text-anchor="{anchor}">'
            f"{html.escape(text)}</text>"
        )


def axis_number(value: float) -> str:
    """1.5e-4 and 12000, where `g` alone would take more room than there is."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:g}"
    mantissa, power = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _head(title: str, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="2" y="14">{html.escape(title)}</text>'
    )


def _nothing(title: str) -> str:
    middle = f'x="{WIDTH / 2:g}" y="{HEIGHT / 2:g}" text-anchor="middle"'
    return f"{_head(title, HEIGHT)}<text {middle}>not known</text></svg>"


def _legend(series: Sequence[Series]) -> tuple[list[str], int]:
    """Names with their colours, and the number of rows that they need."""
    parts, x, row = [], 2, 0
    for i, one in enumerate(series):
        width = 24 + 6 * len(one.name)
        if x > 2 and x + width > WIDTH:
            x, row = 2, row + 1
        y, faint = 29 + row * ROW, ' class="faint"' if one.faint else ""
        parts.append(
            f'<rect x="{x}" y="{y - 8}" width="9" height="9" fill="{COLORS[i % len(COLORS)]}"'
            f'{faint}/><text x="{x + 13}" y="{y}">{html.escape(one.name)}</text>'
        )
        x += width
    return parts, row + 1


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A constant, give or take its last bits: a scale around it whose width belongs to its size.
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
