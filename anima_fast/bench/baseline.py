"""The stored errors and losses of a checkout, and what moved since: the memory of `parity`.

`benchmarks/baselines/parity-cpu.jsonl` is a run file (on a card `parity-sm90.jsonl`) with the rows
of every op, of the block and of the losses. On the machine that wrote it a repeated run has the
same digits, so that any change is one of the code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from anima_fast.bench import compare
from anima_fast.bench.environment import ROOT, differences, environment
from anima_fast.bench.run_file import Measurement, Run, read_run, write_run
from anima_fast.errors import UserError

FOLDER = ROOT / "benchmarks" / "baselines"
UPDATE = "`anima-fast parity --update` stores them"


def baseline_path(device: str) -> Path | None:
    """Where the baseline of this machine's kind is; None outside of a checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        return None
    if device != "cuda":
        return FOLDER / "parity-cpu.jsonl"
    return FOLDER / f"parity-sm{environment()['capability']}.jsonl"


def judged(stored: Run, run: Run, *, whole: bool) -> list[compare.Change]:
    """What moved since `stored`, worst first.

    What was not measured now is left out: rows of another op, metric or type.

    Args:
        stored: the baseline.
        run: this run.
        whole: whether every case of these ops and types was run; else errors and losses are
            compared in the common ones.
    """
    here = [row for row in run.rows if row.provider != "eager" or row.metric != "error"]
    measured = {(row.op, row.metric, row.dtype) for row in here}
    before = [row for row in stored.rows if (row.op, row.metric, row.dtype) in measured]
    before = [row for row in before if row.provider != "eager" or row.metric != "error"]
    if not whole:
        before, here = _common(before, here), _common(here, before)
    first, second = (
        dataclasses.replace(one, rows=tuple(rows)) for one, rows in ((stored, before), (run, here))
    )
    return compare.compare(first, second, compare.limits_of(()))


def _common(rows: Sequence[Measurement], others: Sequence[Measurement]) -> list[Measurement]:
    """Rows with the cases of their errors that the others have too."""
    cases = {row.key: row.parts for row in others}
    kept = []
    for row in rows:
        if row.metric in ("error", "loss"):
            parts = {name: x for name, x in row.parts.items() if name in cases.get(row.key, ())}
            if not parts:
                continue
            row = dataclasses.replace(row, parts=parts)
        kept.append(row)
    return kept


def update(path: Path, found: Sequence[Measurement], order: Sequence[str]) -> None:
    """Store rows, in place of those of the same ops; ops come in `order`.

    Raises:
        UserError: other ops' rows come from another environment, or the file cannot be written.
    """
    ops, here = {row.op for row in found}, environment()
    kept: list[Measurement] = []
    if path.exists():
        stored = read_run(path)
        kept = [row for row in stored.rows if row.op not in ops and row.op in order]
        apart = differences(stored.environment, here) if kept else []
        if apart:
            raise UserError(
                f"{path} comes from another environment ({', '.join(apart)}): a baseline has one, "
                "so update all of it, without --op"
            )
    rows = sorted([*kept, *found], key=lambda row: order.index(row.op))
    write_run(path, here, rows)
