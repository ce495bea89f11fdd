"""Comparison and history as one HTML file each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anima_fast.bench.compare import GONE, NEW, SAME, Change, lines, notes_of, summary
from anima_fast.bench.run_file import Run
from anima_fast.files import write_text
from anima_fast.reports.pages import render

# Half the width of a bar, in pixels.
BAR = 60


def facts(environment: Mapping[str, Any]) -> str:
    """An environment in one line: card or processor, versions, commit, date."""
    where = environment.get("card") or environment.get("processor", "unknown machine")
    words = [f"{name} {environment[name]}" for name in ("torch", "triton") if name in environment]
    commit = environment.get("commit", "")
    words += [f"commit {commit}{'+' if environment.get('dirty') else ''}"] if commit else []
    return ", ".join((where, *words, environment.get("date", "")))


def comparison_page(path: Path, a: Run, b: Run, changes: Sequence[Change]) -> None:
    """Write the page of a comparison: what moved, each with a bar of its ratio."""
    moved = [c for c in changes if c.verdict not in (SAME, NEW, GONE)]
    longest = max((abs(_log2(c)) for c in moved), default=0.0) or 1.0
    rows = [(*line, _bar(_log2(c) / longest))
            for line, c in zip(lines(changes, None), moved, strict=True)]  # fmt: skip
    header = ("", "what", "before", "after", "change", "less · more")
    write_text(path, render(
        "bench.html.j2", title="Comparison of two runs", lead=summary(changes),
        facts={"before": facts(a.environment), "after": facts(b.environment)}, charts=(), hint="",
        notes=[*notes_of(a, b), *(f"{c.verdict}: {c.name}" for c in changes
                                  if c.verdict in (NEW, GONE))],
        tables=[("What moved", header, rows)] if rows else [],
    ))  # fmt: skip


def _log2(change: Change) -> float:
    return math.log2(change.ratio) if 0 < change.ratio < math.inf else 0.0


def _bar(share: float) -> Markup:
    """A bar from the middle, to the right where a value grew; -1 to 1."""
    width = round(BAR * abs(share), 1)
    x = BAR if share > 0 else round(BAR - width, 1)
    return Markup(
        '<svg width="{}" height="12"><path d="M{} 0v12" stroke="currentColor"/>'
        '<rect x="{}" y="2" width="{}" height="8" fill="currentColor"/></svg>'
    ).format(2 * BAR, BAR, x, width)
