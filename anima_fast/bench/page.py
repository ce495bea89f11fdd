"""Comparison and history as one HTML file each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from anima_fast.bench.compare import SAME, Change, lines, summary
from anima_fast.bench.run_file import Run
from anima_fast.files import write_text
from anima_fast.reports.charts import bars
from anima_fast.reports.pages import render

# Bars that fit under one another legibly.
MOST_BARS = 8


def facts(environment: Mapping[str, Any]) -> str:
    """An environment in one line: card or processor, versions, commit, date."""
    where = environment.get("card") or environment.get("processor", "unknown machine")
    words = [f"{name} {environment[name]}" for name in ("torch", "triton") if name in environment]
    commit = environment.get("commit", "")
    words += [f"commit {commit}{'+' if environment.get('dirty') else ''}"] if commit else []
    return ", ".join((where, *words, environment.get("date", "")))


def comparison_page(path: Path, a: Run, b: Run, changes: Sequence[Change]) -> None:
    """Write the page of a comparison: what moved, with a chart of the ratios of each metric."""
    moved = [c for c in changes if c.verdict != SAME]
    metrics = list(dict.fromkeys(c.row.metric for c in moved))
    charts = [chart for metric in metrics if (chart := _ratios(metric, moved))]
    write_text(path, render(
        "bench.html.j2", title="Comparison of two runs", lead=summary(changes),
        facts={"before": facts(a.environment), "after": facts(b.environment)}, notes=(),
        charts=charts, hint="",
        tables=[("What moved", ("", "what", "before", "after", "change"),
                 list(lines(changes, None)))] if moved else [],
    ))  # fmt: skip


def _ratios(metric: str, moved: Sequence[Change]) -> Markup | None:
    found = [c for c in moved if c.row.metric == metric and math.isfinite(c.ratio)][:MOST_BARS]
    if not found:
        return None
    labels = [c.row.op[:7] for c in found]
    return bars(f"{metric}: after / before", labels, [c.ratio for c in found])
