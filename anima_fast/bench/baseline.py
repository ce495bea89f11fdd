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
# On a card: libraries choose their kernels by the card, and sums have another order.
CARD_BAND = 0.20


def baseline_path(device: str) -> Path | None:
    """Where the baseline of this machine's kind is; None outside of a checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        return None
    if device != "cuda":
        return FOLDER / "parity-cpu.jsonl"
    return FOLDER / f"parity-sm{environment()['capability']}.jsonl"


def part_of(stored: Run, found: Sequence[Measurement]) -> Run:
    """The stored rows of what was measured, with the cases that were run."""
    cases = {row.key: row.parts for row in found}
    kept = []
    for row in stored.rows:
        parts = {name: x for name, x in row.parts.items() if name in cases.get(row.key, ())}
        if parts:
            kept.append(dataclasses.replace(row, parts=parts))
    return dataclasses.replace(stored, rows=tuple(kept))


def judged(
    stored: Run, found: Sequence[Measurement], *, whole: bool
) -> tuple[list[compare.Change], list[str]]:
    """What moved since `stored`, worst first, and what to say about the environment.

    Args:
        stored: the baseline.
        found: the rows of this run.
        whole: whether every case of these ops and dtypes was run; else the common ones count.
    """
    own = [row for row in found if row.provider == "own"]
    here, before = Run(environment(), tuple(own), "this run"), stored
    if not whole:
        before = part_of(stored, own)
        here = part_of(here, before.rows)
    measured = {(row.op, row.dtype) for row in own}
    rows = [r for r in before.rows if r.provider == "own" and (r.op, r.dtype) in measured]
    limits = compare.limits_of(())
    notes = []
    if any(row.source == "card" for row in own):
        limits["error"] = max(limits["error"], CARD_BAND)
    if apart := differences(stored.environment, here.environment):
        error, loss = compare.ELSEWHERE["error"], compare.ELSEWHERE["loss"]
        notes.append(
            f"the baseline comes from another environment ({', '.join(apart)}): a float32 error "
            f"may grow by {error:.0%}, a loss move by {loss:.0%}"
        )
    return compare.compare(dataclasses.replace(before, rows=tuple(rows)), here, limits), notes


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
