"""Values over commits: the run files of a folder in order of time, and where a value stepped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anima_fast.bench.choice import Choice
from anima_fast.bench.compare import (
    BETTER,
    LOST,
    WORSE,
    Change,
    change_text,
    compare,
    limits_of,
    number,
)
from anima_fast.bench.page import facts
from anima_fast.bench.run_file import Measurement, Run, read_run
from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.reports.charts import Series, chart
from anima_fast.reports.pages import render

# A time stepped when its interval lies beyond this much; other metrics beyond their own limit.
STEP = 0.05
MOST_CHARTS = 12


@dataclass(frozen=True)
class Line:
    """One measurement over the runs.

    Attributes:
        row: its latest.
        values: (run, value) in order of time, of the runs that have it.
        step: index into `values` of the first run whose value stepped, or None.
        change: what moved there, and by how much.
    """

    row: Measurement
    values: tuple[tuple[Run, Measurement], ...]
    step: int | None
    change: Change | None

    @property
    def verdict(self) -> str:
        """On the step."""
        return self.change.verdict if self.change else ""


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
            sizes = set(row.case.split())
            cased = all(f"{letter}={size}" in sizes for letter, size in choice.sizes.items())
            if row.value is not None and cased and choice.wants_op(row.op) and choice.accepts(row):
                # Cards are lines of their own.
                machine = run.environment.get("card") or run.environment.get("processor", "")
                found.setdefault((*row.key, machine), []).append((run, row))
    lines = [Line(values[-1][1], tuple(values), *stepped(values)) for values in found.values()]
    return sorted(lines, key=lambda line: line.step is None)


def stepped(values: Sequence[tuple[Run, Measurement]]) -> tuple[int | None, Change | None]:
    """The first index whose value moved from the one before beyond the metric's limit, and how."""
    limits = {**limits_of(()), "time": STEP, "startup": STEP}
    for index in range(1, len(values)):
        (old, before), (new, after) = values[index - 1 : index + 1]
        (change,) = compare(replace(old, rows=(before,)), replace(new, rows=(after,)), limits)
        if change.verdict in (WORSE, LOST, BETTER):
            return index, change
    return None, None


def commit_of(run: Run) -> str:
    """The commit of a run, "+" behind it when files differed; its file without one."""
    commit = run.environment.get("commit")
    if not commit:
        return Path(run.name).stem
    return commit[:9] + ("+" if run.environment.get("dirty") else "")


def text_of(lines: Sequence[Line]) -> Iterator[str]:
    """For each line its name, then one line a commit; what moved where it stepped."""
    for line in lines:
        yield str(line.row)
        previous = math.nan
        for index, (run, row) in enumerate(line.values):
            assert row.value is not None
            change = (
                "" if not index or not previous else f"{100 * (row.value / previous - 1):+.1f} %"
            )
            mark = ""
            if index == line.step and line.change:
                part = (
                    f" [{line.change.part}] {change_text(line.change)}" if line.change.part else ""
                )
                mark = f"  <- {line.change.verdict}{part}"
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
        charts.append(chart(str(line.row), [Series(str(line.row), points)], over="run"))
    rows = [
        (
            line.change.verdict if line.change and index == line.step else "",
            str(line.row),
            commit_of(run),
            number(row.value),
        )
        for line in lines
        for index, (run, row) in enumerate(line.values)
    ]  # fmt: skip
    first = next((line for line in lines if line.step is not None), None)
    count = sum(line.step is not None for line in lines)
    write_text(path, render(
        "bench.html.j2", title="History of measurements",
        lead=f"{len(runs)} runs, {len(lines)} of their measurements, {count} stepped",
        facts={"first": facts(runs[0].environment), "last": facts(runs[-1].environment)},
        notes=() if len(lines) <= MOST_CHARTS else (f"The first {MOST_CHARTS} are drawn.",),
        charts=charts, tables=[("Values", ("", "what", "commit", "value"), rows)] if rows else [],
        hint=bisect_line(first) if first else "",
    ))  # fmt: skip
