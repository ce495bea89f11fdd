"""`results.csv`, `results.json` and `report.html` from the files that slices left (suite.py).

The page needs nothing else and has no script. A speed-up is shown only for an op whose parity
checks stand in the same folder and have not failed, and never for times taken on a CPU.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import write_json, write_text
from anima_fast.reports.pages import STYLE
from benchmarks import compare
from benchmarks.rows import Row, read_rows, write_rows
from benchmarks.slices import FAILED, PASSED, TIMED_OUT, read_records
from benchmarks.suite_sections import (
    Html,
    memory_section,
    ops_section,
    prediction_section,
    step_section,
    table,
)

MORE_STYLE = """
.wide { overflow-x: auto; } table.data { font-variant-numeric: tabular-nums; margin: 8px 0 16px;
  font-size: 13px; }
table.data th { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); }
table.data td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: normal; white-space: nowrap; }
table.data .n { text-align: right; } td.why { white-space: normal !important; min-width: 220px; }
.passed { color: var(--c); } .failed, .timed { color: var(--b); font-weight: 600; }
.skipped, .soft { color: var(--soft); } h3 { font-size: 15px; margin: 20px 0 4px; }
.note { border-left: 4px solid var(--b); padding: 8px 12px; margin: 16px 0; }
svg { width: 100%; min-width: 600px; max-width: 860px; height: auto; display: block;
  margin: 12px 0; }
pre { font-size: 12px; overflow-x: auto; } summary { cursor: pointer; color: var(--soft); }
"""
LOG_LINES = 25
CPU_NOTE = (
    "No CUDA card: these figures were taken on a CPU at tiny sizes. They show that the code runs. "
    "They say nothing about speed, “ours” runs the plain PyTorch definitions there, and parity ran "
    "in Triton's interpreter."
)


def build_report(folder: Path) -> dict[str, Any]:
    """Put together what stands in `folder` and write the three files.

    Returns:
        What `results.json` holds: `slices`, `rows`, `parity`, `resources`.

    Raises:
        UserError: the folder cannot be written, or holds rows of another version.
    """
    records = read_records(folder)
    rows: list[Row] = []
    parity: list[dict[str, Any]] = []
    resources: dict[str, Any] = {}
    for record in records:
        base = folder / "slices" / record["name"]
        rows += read_rows(base.with_suffix(".csv"))
        if record["name"].startswith("parity-"):
            parity += read_json(base.with_suffix(".out"), list)
        if record["name"] == "resources":
            resources = read_json(base.with_suffix(".out"), dict)
    found = {
        "slices": records,
        "rows": [asdict(row) for row in rows],
        "parity": parity,
        "resources": resources,
    }
    write_rows(folder / "results.csv", rows)
    write_json(folder / "results.json", found)
    write_text(folder / "report.html", page(folder, records, rows, parity, resources))
    return found


def read_json(path: Path, kind: type) -> Any:
    """The JSON that a command printed, empty when it printed none of that kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()


def page(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    parity: Sequence[Mapping[str, Any]],
    resources: Mapping[str, Any],
) -> str:
    """The whole HTML page."""
    ran = [r for r in records if r["status"] in (PASSED, FAILED, TIMED_OUT)]
    bad = [r for r in records if r["status"] in (FAILED, TIMED_OUT)]
    machines = list(dict.fromkeys(r["card"] for r in records)) or ["nothing has run"]
    lead = f"{', '.join(machines)}. {len(ran)} of {len(records)} slices ran" + (
        f", {len(bad)} of them failed: {', '.join(r['name'] for r in bad)}." if bad else "."
    )
    body = [f"<h1>Kernels: right and fast?</h1>\n<p class='lead'>{html.escape(lead)}</p>"]
    if any(compare.is_cpu(card) for card in machines):
        body.append(f"<p class='note'>{CPU_NOTE}</p>")
    body += [facts(records), slices_section(folder, records)]
    checked = compare.parity_summary(parity)
    # An op is green when its own slice has run to its end and no check failed.
    whole = {r["name"].removeprefix("parity-") for r in records if r["status"] == PASSED}
    green = {op for op, entry in checked.items() if op in whole and not entry["failed"]}
    body.append(parity_section(checked))
    for card in compare.cards(rows):
        own = [row for row in rows if row.card == card]
        sections = [ops_section(own, green), step_section(own), memory_section(own)]
        if not compare.is_cpu(card):
            sections.append(prediction_section(own))
        if any(sections):
            body.append(f"<h2>{html.escape(card)}</h2>")
        body += filter(None, sections)
    body.append(resources_section(resources))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Kernels</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def facts(records: Sequence[Mapping[str, Any]]) -> str:
    """Card, versions, commit and date, all that occur."""
    lines = []
    for name in ("card", "torch", "triton", "commit", "date"):
        values = ", ".join(dict.fromkeys(str(r[name]) for r in records if r.get(name)))
        lines.append(f"<tr><th>{name}</th><td>{html.escape(values or '–')}</td></tr>")
    command = "python -m benchmarks.suite --out DIR"
    lines.append(f"<tr><th>command</th><td><code>{command}</code></td></tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def slices_section(folder: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """What ran, how it ended, and the last lines of what failed."""
    lines, logs = [], []
    for record in records:
        status = record["status"]
        mark = f"<span class='{status.split()[0]}'>{status}</span>"
        lines.append((record["name"], Html(mark), f"{record['seconds']:.0f} s", record["title"],
                      record["reason"]))  # fmt: skip
        if status in (FAILED, TIMED_OUT):
            logs.append(
                f"<details><summary>{html.escape(record['name'])}: last lines</summary>"
                f"<pre>{html.escape(tail(folder, record['name']))}</pre></details>"
            )
    shown = table(("slice", "", "time", "what", "reason"), lines, left=(0, 1, 3, 4), why=4)
    return "<h2>Slices</h2>\n" + shown + "\n".join(logs)


def tail(folder: Path, name: str) -> str:
    """The last lines that a slice printed."""
    lines: list[str] = []
    for suffix in (".out", ".log"):
        path = folder / "slices" / f"{name}{suffix}"
        if path.exists():
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


def parity_section(checked: Mapping[str, Mapping[str, Any]]) -> str:
    """Per op: checks, failures, worst error by dtype."""
    if not checked:
        return ""
    dtypes = ("float32", "float16", "bfloat16")
    lines = []
    for op, entry in checked.items():
        worst = (entry["worst"].get(dtype) for dtype in dtypes)
        failed = len(entry["failed"])
        mark = f"<span class='failed'>{failed}</span>" if failed else "0"
        lines.append((op, str(entry["checks"]), Html(mark),
                      *("–" if w is None else percent(w) for w in worst)))  # fmt: skip
    text = (
        "<h2>Parity</h2>\n<p class='soft'>Every output and gradient against the definition in "
        "float64; allowed is twice the error of the definition in the same dtype, and a floor. "
        "Shown: the largest error, in shares of what is allowed.</p>\n"
    )
    return text + table(("op", "checks", "failed", *dtypes), lines)


def percent(share: float) -> str:
    """A share in per cent; an error that is no number is called that."""
    return f"{share:.0%}" if math.isfinite(share) else "not finite"


def resources_section(resources: Mapping[str, Any]) -> str:
    """The table of `bench resources`."""
    if not resources.get("kernels"):
        return ""
    from anima_fast.bench.resources import Resources
    from anima_fast.bench.tables import resources_table

    try:
        kernels = [
            Resources(**{k: v for k, v in record.items() if k != "problems"})
            for record in resources["kernels"]
        ]
    except TypeError as error:
        raise UserError(
            f"resources are of another version ({error}): run the slice again"
        ) from error
    problems = "".join(f"<p class='failed'>{html.escape(p)}</p>" for p in resources["problems"])
    return (
        "<h2>Resources</h2>\n<p class='soft'>Compiled, not run: registers a thread, KiB of shared "
        "memory a block, occupancy; the worst variant of each kernel per compute capability."
        f"</p>\n{problems}<pre>{html.escape(resources_table(kernels))}</pre>"
    )
