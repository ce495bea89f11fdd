"""Curves of any length in a bounded number of points.

A table holds one row for every `stride` records. When it is full, neighbouring rows are joined and
the stride doubles, so a log of a million steps takes as much memory, and as long to send, as one
of two thousand. A row keeps the mean, the lowest and the highest value of each column: spikes stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# A longer log fills between half of them and all of them.
MOST_ROWS = 2000
# Further columns (groups with rates of their own) are not kept.
MOST_COLUMNS = 64


class _Cell(NamedTuple):
    """The values of one column in one row."""

    total: float
    size: int
    low: float
    high: float


class CurveTable:
    """Values over steps, thinned as they grow; `most_rows` is an even number."""

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.most_rows = most_rows
        self.stride = 1
        # The last step of each row, and its epoch.
        self.steps: list[float] = []
        self.epochs: list[float | None] = []
        # A cell for each row, None where nothing is known.
        self.columns: dict[str, list[_Cell | None]] = {}
        self.records = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: float, values: Mapping[str, float | None], epoch: float | None) -> bool:
        """Add a record, and say whether its step comes after the last one; else it is left out.

        `values` are finite numbers, or None where nothing is known.
        """
        if self.steps and step <= self.steps[-1]:
            return False
        if self.records % self.stride == 0:
            self._new_row(step, epoch)
        self.steps[-1], self.epochs[-1] = step, epoch
        self.records += 1
        for name, value in values.items():
            if name not in self.columns and len(self.columns) < MOST_COLUMNS:
                self.columns[name] = [None] * len(self.steps)
            if name in self.columns and value is not None:
                cells = self.columns[name]
                cells[-1] = _joined(cells[-1], _Cell(value, 1, value, value))
        return True

    def answer(self, first: int = 0) -> dict[str, Any]:
        """The rows from `first` on, as JSON holds them."""
        first = max(0, min(first, len(self.steps)))
        return {
            "stride": self.stride,
            "first": first,
            "steps": self.steps[first:],
            "epochs": self.epochs[first:],
            "columns": {name: _answer(cells[first:]) for name, cells in self.columns.items()},
        }

    def _new_row(self, step: float, epoch: float | None) -> None:
        if len(self.steps) == self.most_rows:
            self.steps = self.steps[1::2]
            self.epochs = self.epochs[1::2]
            self.columns = {
                name: [_joined(a, b) for a, b in zip(cells[::2], cells[1::2], strict=True)]
                for name, cells in self.columns.items()
            }
            self.stride *= 2
        self.steps.append(step)
        self.epochs.append(epoch)
        for cells in self.columns.values():
            cells.append(None)


def _joined(a: _Cell | None, b: _Cell | None) -> _Cell | None:
    if a is None or b is None:
        return a or b
    return _Cell(a.total + b.total, a.size + b.size, min(a.low, b.low), max(a.high, b.high))


def _answer(cells: Sequence[_Cell | None]) -> dict[str, list[float | None]]:
    """`mean` of each cell, and `low` and `high` unless they are the same everywhere."""
    columns = {"mean": [cell and _short(cell.total / cell.size) for cell in cells]}
    if any(cell and cell.size > 1 for cell in cells):
        columns["low"] = [cell and _short(cell.low) for cell in cells]
        columns["high"] = [cell and _short(cell.high) for cell in cells]
    return columns


def _short(value: float) -> float | None:
    """Six significant digits: more cannot be seen. None for a mean beyond what a float holds."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
