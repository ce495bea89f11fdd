"""Curves of any length in a bounded number of points.

A table holds one row for every `stride` records. When it is full, neighbouring rows are joined and
the stride doubles, so a log of a million steps takes as much memory, and as long to send, as one
of two thousand. A row keeps the mean, the lowest and the highest value of each column: spikes stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# A longer log fills between half of them and all of them.
MOST_ROWS = 2000
# Further columns (groups with rates of their own) are not kept.
MOST_COLUMNS = 64


class _Column:
    """Sum, count, lowest and highest value of each row."""

    def __init__(self, rows: int) -> None:
        self.total = [0.0] * rows
        self.count = [0] * rows
        self.low = [math.inf] * rows
        self.high = [-math.inf] * rows

    def append_empty(self) -> None:
        self.total.append(0.0)
        self.count.append(0)
        self.low.append(math.inf)
        self.high.append(-math.inf)

    def put(self, value: float) -> None:
        """Add a value to the last row."""
        self.total[-1] += value
        self.count[-1] += 1
        self.low[-1] = min(self.low[-1], value)
        self.high[-1] = max(self.high[-1], value)

    def halve(self) -> None:
        """Join neighbouring rows; the number of rows is even."""
        self.total = [a + b for a, b in _pairs(self.total)]
        self.count = [a + b for a, b in _pairs(self.count)]
        self.low = [min(pair) for pair in _pairs(self.low)]
        self.high = [max(pair) for pair in _pairs(self.high)]

    def answer(self, first: int) -> dict[str, list[float | None]]:
        """`mean` of the rows from `first` on, and `low` and `high` where they differ from it."""
        rows = range(first, len(self.count))
        known = [self.count[i] > 0 for i in rows]
        mean = [
            _short(self.total[i] / self.count[i]) if k else None
            for i, k in zip(rows, known, strict=True)
        ]
        if max((self.count[i] for i in rows), default=0) <= 1:
            return {"mean": mean}
        low = [_short(self.low[i]) if k else None for i, k in zip(rows, known, strict=True)]
        high = [_short(self.high[i]) if k else None for i, k in zip(rows, known, strict=True)]
        return {"mean": mean, "low": low, "high": high}


class CurveTable:
    """Values over steps, thinned as they grow.

    Args:
        most_rows: an even number.
    """

    def __init__(self, most_rows: int = MOST_ROWS) -> None:
        self.most_rows = most_rows
        self.stride = 1
        # The last step of each row, and its epoch.
        self.steps: list[float] = []
        self.epochs: list[float | None] = []
        self.columns: dict[str, _Column] = {}
        self.records = 0

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: float, values: Mapping[str, float | None], epoch: float | None) -> bool:
        """Add a record; one whose step is not after the last one is left out.

        Args:
            step: the x value.
            values: a finite number, or None where nothing is known, for each column.
            epoch: shown with the step.

        Returns:
            Whether it was added.
        """
        if self.steps and step <= self.steps[-1]:
            return False
        if self.records % self.stride == 0:
            self._new_row(step, epoch)
        self.steps[-1] = step
        self.epochs[-1] = epoch
        self.records += 1
        for name, value in values.items():
            column = self._column(name)
            if column is not None and value is not None:
                column.put(value)
        return True

    def answer(self, first: int = 0) -> dict[str, Any]:
        """The rows from `first` on, as JSON holds them."""
        first = max(0, min(first, len(self.steps)))
        return {
            "stride": self.stride,
            "first": first,
            "steps": self.steps[first:],
            "epochs": self.epochs[first:],
            "columns": {name: column.answer(first) for name, column in self.columns.items()},
        }

    def _new_row(self, step: float, epoch: float | None) -> None:
        if len(self.steps) == self.most_rows:
            self.steps = self.steps[1::2]
            self.epochs = self.epochs[1::2]
            for column in self.columns.values():
                column.halve()
            self.stride *= 2
        self.steps.append(step)
        self.epochs.append(epoch)
        for column in self.columns.values():
            column.append_empty()

    def _column(self, name: str) -> _Column | None:
        if name not in self.columns and len(self.columns) < MOST_COLUMNS:
            self.columns[name] = _Column(len(self.steps))
        return self.columns.get(name)


def _pairs(values: list) -> zip:
    return zip(values[::2], values[1::2], strict=True)


def _short(value: float) -> float | None:
    """Six significant digits: more cannot be seen. None for a mean beyond what a float holds."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
