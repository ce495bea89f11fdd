"""Values over commits: the run files of a folder in order of time, and where a value stepped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anima_fast.bench.choice import Choice
from anima_fast.bench.compare import number, ratio_interval
from anima_fast.bench.metrics import METRICS
from anima_fast.bench.page import facts
from anima_fast.bench.run_file import Measurement, Run, read_run
from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.reports.charts import Series, chart
from anima_fast.reports.pages import render

# A time stepped when its interval lies beyond this much; other metrics at any change beyond theirs.
STEP = 0.05
MOST_CHARTS = 12


@dataclass(frozen=True)
class Line:
    """One measurement over the runs.

    Attributes:
        row: its latest.
        values: (run, value) in order of time, of the runs that have it.
        step: index into `values` of the first run whose value stepped, or None.
    """

    row: Measurement
    values: tuple[tuple[Run, Measurement], ...]
    step: int | None


def read_runs(folder: Path) -> list[Run]:
    """The run files of a folder, oldest first. Raises `UserError` when there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the one that `bench run --out` writes into")
    runs = [read_run(path) for path in sorted(folder.glob("*.jsonl"))]
    if not runs:
        raise UserError(f"{folder} holds no run file (*.jsonl)")
    return sorted(runs, key=lambda run: run.environment.get("date", ""))


def history(runs: Sequence[Run], choice: Choice) -> list[Line]:
    """The lines of what is chosen; those that stepped first."""
    found: dict[tuple[str, ...], list[tuple[Run, Measurement]]] = {}
    for run in runs:
        for row in run.by_key().values():
            if row.value is not None and _is_chosen(row, choice):
                # Cards are lines of their own.
                machine = run.environment.get("card") or run.environment.get("processor", "")
                found.setdefault((*row.key, machine), []).append((run, row))
    lines = [Line(values[-1][1], tuple(values), stepped(values)) for values in found.values()]
    return sorted(lines, key=lambda line: line.step is None)


def _is_chosen(row: Measurement, choice: Choice) -> bool:
    sizes = set(row.case.split())
    return (
        choice.wants_op(row.op)
        and choice.wants(row.metric)
        and (not choice.providers or row.provider.split()[0] in choice.providers)
        and (not choice.dtypes or row.dtype in choice.dtypes)
        and all(f"{letter}={size}" in sizes for letter, size in choice.sizes.items())
    )


def stepped(values: Sequence[tuple[Run, Measurement]]) -> int | None:
    """The first index whose value is another than the one before it, by the metric's limit."""
    for index in range(1, len(values)):
        old, new = values[index - 1][1], values[index][1]
        metric = METRICS[new.metric]
        if not metric.exact and old.samples and new.samples:
            low, high = ratio_interval(old.samples, new.samples)
            if low > 1 + STEP or high < 1 / (1 + STEP):
                return index
            continue
        assert old.value is not None and new.value is not None
        change = abs(new.value - old.value) / abs(old.value) if old.value else abs(new.value)
        if change > (metric.limit if metric.limit is not None else STEP):
            return index
    return None


def commit_of(run: Run) -> str:
    """The commit of a run, "+" behind it when files differed; its file without one."""
    commit = run.environment.get("commit")
    if not commit:
        return Path(run.name).stem
    return commit[:9] + ("+" if run.environment.get("dirty") else "")


def text_of(lines: Sequence[Line]) -> Iterator[str]:
    """For each line its name, then one line a commit; "<- stepped" where it did."""
    for line in lines:
        yield str(line.row)
        previous = math.nan
        for index, (run, row) in enumerate(line.values):
            assert row.value is not None
            change = (
                "" if not index or not previous else f"{100 * (row.value / previous - 1):+.1f} %"
            )
            mark = "  <- stepped" if index == line.step else ""
            date = run.environment.get("date", "")[:16]
            yield f"  {commit_of(run):12} {date:16} {number(row.value):>12} {change:>9}{mark}"
            previous = row.value
    if not lines:
        yield "no run holds such a measurement"


def bisect_line(line: Line) -> str:
    """The command that finds the commit between the two runs of a step."""
    assert line.step is not None
    (good, _), (bad, row) = line.values[line.step - 1], line.values[line.step]
    return (
        f"git bisect start {commit_of(bad).rstrip('+')} {commit_of(good).rstrip('+')}\n"
        f"git bisect run anima-fast bench compare {commit_of(good).rstrip('+')} HEAD "
        f"--op {row.op} --metric {row.metric}"
    )


def history_page(path: Path, runs: Sequence[Run], lines: Sequence[Line]) -> None:
    """Write the page: a chart for each line, a table, and how to find the rest by bisection."""
    charts = []
    for line in lines[:MOST_CHARTS]:
        points = [(float(i + 1), row.value) for i, (_, row) in enumerate(line.values)]
        name = f"{line.row.op} {line.row.metric} {line.row.provider} {line.row.mode}".strip()
        charts.append(chart(name, [Series(name, points)]))
    rows = [
        ("stepped" if index == line.step else "", str(line.row), commit_of(run), number(row.value))
        for line in lines
        for index, (run, row) in enumerate(line.values)
    ]
    first = next((line for line in lines if line.step is not None), None)
    count = sum(line.step is not None for line in lines)
    write_text(path, render(
        "bench.html.j2", title="History of measurements",
        lead=f"{len(runs)} runs, {len(lines)} measurements, {count} stepped",
        facts={"first": facts(runs[0].environment), "last": facts(runs[-1].environment)},
        notes=() if len(lines) <= MOST_CHARTS else (f"The first {MOST_CHARTS} are drawn.",),
        charts=charts, tables=[("Values", ("", "what", "commit", "value"), rows)],
        hint=bisect_line(first) if first else "",
    ))  # fmt: skip
