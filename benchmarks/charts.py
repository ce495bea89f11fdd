"""Bars and rooflines as SVG text, styled by the page they stand in (`report.STYLE`)."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anima_fast.reports.charts import ticks

WIDTH, LABEL, RIGHT, TOP = 720, 250, 66, 44
BAR, GAP, FOOT = 11, 9, 24
# Whoever stands first in a provider's name; others take the last.
COLORS = {
    "eager": "var(--soft)", "compiled": "var(--b)", "ours": "var(--a)", "library": "var(--c)",
    "diffusers": "var(--d)", "measured": "var(--a)", "predicted": "var(--b)",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One bar: whose it is, its length, and quantiles around it when they are known."""

    provider: str
    value: float
    low: float | None = None
    high: float | None = None


def color(provider: str) -> str:
    """The colour of a provider, the same in every chart."""
    return COLORS.get(provider.split()[0] if provider else "", "var(--d)")


def number(value: float | None) -> str:
    """Three significant digits without an exponent; "–" for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def bars(
    title: str, groups: Mapping[str, Sequence[Bar]], unit: str, *, limit: float | None = None
) -> str:
    """Horizontal bars in groups, each with its value; `limit` draws a line, a ceiling."""
    everything = [bar for group in groups.values() for bar in group]
    if not everything:
        return ""
    longest = max([bar.high or bar.value for bar in everything] + [limit or 0.0])
    scale = ticks(0.0, longest, 6) if longest > 0 else [0.0, 1.0]
    end = scale[-1]
    rows = sum(len(group) for group in groups.values())
    height = TOP + rows * (BAR + 3) + len(groups) * GAP + FOOT
    bottom = height - FOOT

    def x(value: float) -> float:
        return LABEL + value / end * (WIDTH - LABEL - RIGHT)

    parts = [_head(title, height), _legend({bar.provider.split()[0] for bar in everything})]
    for tick in scale:
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" '
            f'y2="{bottom}"/><text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">'
            f"{tick:.4g}</text>"
        )
    parts.append(f'<text x="{WIDTH - 4}" y="{bottom + 14}" text-anchor="end">{unit}</text>')
    if limit is not None:
        parts.append(
            f'<line stroke="var(--ink)" stroke-dasharray="4 3" x1="{x(limit):.1f}" '
            f'x2="{x(limit):.1f}" y1="{TOP - 6}" y2="{bottom}"/>'
        )
    y = float(TOP)
    for name, group in groups.items():
        middle = y + len(group) * (BAR + 3) / 2 + 3
        parts.append(
            f'<text x="{LABEL - 8}" y="{middle:.1f}" text-anchor="end">{html.escape(name)}</text>'
        )
        for bar in group:
            parts.append(_bar(bar, x, y))
            y += BAR + 3
        y += GAP
    return "".join([*parts, "</svg></div>"])


def _bar(bar: Bar, x, y: float) -> str:
    middle, end = y + BAR / 2, x(max(bar.value, bar.high or 0.0))
    tip = html.escape(f"{bar.provider}: {number(bar.value)}")
    drawn = (
        f'<rect x="{LABEL}" y="{y:.1f}" width="{max(1.0, x(bar.value) - LABEL):.1f}" '
        f'height="{BAR}" fill="{color(bar.provider)}"><title>{tip}</title></rect>'
    )
    if bar.low is not None and bar.high is not None:
        drawn += (
            f'<line stroke="var(--ink)" x1="{x(bar.low):.1f}" x2="{x(bar.high):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
    return drawn + f'<text x="{end + 5:.1f}" y="{y + BAR - 1:.1f}">{number(bar.value)}</text>'


def roofline(
    title: str, points: Sequence[tuple[str, str, float, float]], bandwidth: float, peak: float
) -> str:
    """Operations a second over operations a byte, both logarithmic, below the measured roof.

    Args:
        points: (provider, label, operations a byte, operations a second).
        bandwidth, peak: the ceilings, bytes and operations a second.
    """
    points = [p for p in points if p[2] > 0 and p[3] > 0]
    if not points:
        return ""
    left, height, bottom = 64, 330, 292
    ridge = peak / bandwidth
    low_x = 10 ** math.floor(math.log10(min([ridge, *(p[2] for p in points)]) / 2))
    high_x = 10 ** math.ceil(math.log10(max([ridge, *(p[2] for p in points)]) * 2))
    low_y = 10 ** math.floor(math.log10(min([bandwidth * low_x, *(p[3] for p in points)])))
    high_y = 10 ** math.ceil(math.log10(max([peak, *(p[3] for p in points)])))

    def place(across: float, up: float) -> tuple[float, float]:
        share_x = math.log(across / low_x) / math.log(high_x / low_x)
        share_y = math.log(up / low_y) / math.log(high_y / low_y)
        return left + share_x * (WIDTH - left - RIGHT), bottom - share_y * (bottom - TOP)

    parts = [_head(title, height), _legend({p[0].split()[0] for p in points})]
    for power in range(round(math.log10(low_y)), round(math.log10(high_y)) + 1):
        _, y = place(low_x, 10.0**power)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{10.0 ** (power - 12):g}</text>"
        )
    for power in range(round(math.log10(low_x)), round(math.log10(high_x)) + 1):
        x, _ = place(10.0**power, low_y)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{10.0**power:g}</text>'
        )
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{height - 6}" text-anchor="middle">operations a byte; '
        "upwards TFLOP/s</text>"
    )
    roof = [place(low_x, bandwidth * low_x), place(ridge, peak), place(high_x, peak)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in roof)
    parts.append(f'<polyline stroke="var(--ink)" stroke-dasharray="4 3" points="{line}"/>')
    for provider, label, across, up in points:
        x, y = place(across, up)
        tip = html.escape(f"{provider} {label}: {up / 1e12:.3g} TFLOP/s")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color(provider)}" '
            f'fill-opacity=".8"><title>{tip}</title></circle>'
        )
    return "".join([*parts, "</svg></div>"])


def _head(title: str, height: float) -> str:
    return (
        '<div class="wide">'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">'
        f'<text class="title" x="4" y="14">{html.escape(title)}</text>'
    )


def _legend(names: set[str]) -> str:
    parts, at = [], 4
    for name in sorted(names, key=lambda n: (list(COLORS).index(n) if n in COLORS else 99, n)):
        parts.append(
            f'<rect x="{at}" y="23" width="9" height="9" fill="{color(name)}"/>'
            f'<text x="{at + 13}" y="31">{html.escape(name)}</text>'
        )
        at += 34 + 6 * len(name)
    return "".join(parts)
