"""Line and bar charts as SVG elements, styled by the page that holds them.

This file decides where everything goes; `templates/chart.svg.j2` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from anima_fast.reports.pages import render

# The size of a phone: letters are legible there, and three charts fit side by side on a desk.
WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 42, 34
# Of a legend.
ROW_HEIGHT = 14
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
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        return [
            (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
            for group in groups
        ]


def chart(title: str, series: Sequence[Series], zero: bool = False, over: str = "step") -> Markup:
    """An SVG element with lines over steps (or `over`), axes, and a legend for several lines.

    Series without a point are left out; a single point is drawn as a dot. The axis begins at 0 with
    `zero`, else near the lowest value.
    """
    drawn = [(one, points) for one in series if (points := one.known())]
    if not drawn:
        return _draw(title)
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    first, last = min(xs), max(xs)
    legend, rows = _legend([one for one, _ in drawn]) if len(drawn) > 1 else ([], 1)
    plot = _Plot(title, ticks(min(0, *ys) if zero else min(ys), max(ys), 5), rows)

    def across(x: float) -> float:
        share = (x - first) / ((last - first) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    # There is no half step.
    marks = [x for x in ticks(first, last, 5) if first <= x <= last and x == int(x)] or [first]
    below = [plot.below(across(x), f"{x:.6g}") for x in marks]
    below.append(((LEFT + WIDTH - RIGHT) / 2, plot.bottom + 29, "middle", over))
    lines = [
        (COLORS[i % len(COLORS)], one.faint, [(across(x), plot.height_of(y)) for x, y in points])
        for i, (one, points) in enumerate(drawn)
    ]
    return plot.draw(legend=legend, below=below, lines=lines)


def bars(title: str, labels: Sequence[str], values: Sequence[float | None]) -> Markup:
    """An SVG element with a bar from 0 for each value, and its label; None leaves a gap."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return _draw(title)
    plot = _Plot(title, ticks(0.0, max(known) or 1.0, 5))
    step = (WIDTH - LEFT - RIGHT) / len(values)
    below, drawn = [], []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        x = LEFT + i * step
        below.append(plot.below(round(x + step / 2, 1), label))
        if value is not None and math.isfinite(value):
            y = plot.height_of(value)
            width, height = round(step - 4, 1), round(plot.bottom - y, 1)
            drawn.append((round(x + 2, 1), y, width, height, f"{value:.5g}"))
    return plot.draw(below=below, bars=drawn)


class _Plot:
    """The vertical axis and the place of each value; rows of a legend make the chart higher."""

    def __init__(self, title: str, marks: Sequence[float], legend_rows: int = 1) -> None:
        self.title, self.marks = title, marks
        more = (legend_rows - 1) * ROW_HEIGHT
        self.top, self.height = TOP + more, HEIGHT + more
        self.bottom = self.height - BOTTOM

    def height_of(self, value: float) -> float:
        """The y of a value."""
        share = (value - self.marks[0]) / (self.marks[-1] - self.marks[0])
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def below(self, x: float, text: str) -> tuple[float, int, str, str]:
        """Place and anchor of a text under the plot; the last one ends where the chart does."""
        anchor = "end" if x > WIDTH - 4 * len(text) else "middle"
        return x, self.bottom + 16, anchor, text

    def draw(self, **parts: Any) -> Markup:
        """The SVG element with `legend`, `below`, `lines` and `bars`."""
        grid = [(self.height_of(mark), axis_number(mark)) for mark in self.marks]
        return _draw(self.title, self.height, grid=grid, **parts)


def axis_number(value: float) -> str:
    """1.5e-4 and 12000, where `g` alone would take more room than there is."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:g}"
    mantissa, power = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _draw(title: str, height: int = HEIGHT, **parts: Any) -> Markup:
    """The SVG element; without parts it says that nothing is known."""
    parts = parts or {"below": [(WIDTH / 2, HEIGHT / 2, "middle", "not known")]}
    nothing = dict.fromkeys(("grid", "legend", "below", "lines", "bars"), ())
    size = {"width": WIDTH, "height": height, "left": LEFT, "right": WIDTH - RIGHT}
    return render("chart.svg.j2", title=title, color=COLORS[0], **size, **{**nothing, **parts})


def _legend(series: Sequence[Series]) -> tuple[list[tuple[int, int, str, bool, str]], int]:
    """Place, colour and name of each line, and the number of rows that they need."""
    entries, x, row = [], 2, 0
    for i, one in enumerate(series):
        width = 24 + 6 * len(one.name)
        if x > 2 and x + width > WIDTH:
            x, row = 2, row + 1
        entries.append((x, 29 + row * ROW_HEIGHT, COLORS[i % len(COLORS)], one.faint, one.name))
        x += width
    return entries, row + 1


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A constant, give or take its last bits: the scale around it is as wide as it is large.
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
