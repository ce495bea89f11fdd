"""What all benchmarks share: where rows go, the ceilings of this run, the clock of a slice.

    python -m pytest benchmarks/test_ops.py --rows rows.csv --tokens 1024

Without a card everything runs at one tiny size on the CPU, kernels in Triton's interpreter for
parity and references where time is taken: that shows that the code runs and nothing else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before anything imports triton: without a card its kernels run interpreted, on the CPU.
if not torch.cuda.is_available():
    from anima_fast.bench import interpreter

    interpreter.start()

from anima_fast.measure.timer import Ceilings, ceilings, on_card
from benchmarks.rows import Row, append_row, machine

CPU_NOTE = "(on a CPU ours runs the plain definitions of the kernels)"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anima-fast benchmarks")
    group.addoption("--rows", type=Path, help="CSV file to which measurements are added")
    group.addoption("--tokens", type=int, action="append", help="image tokens; repeatable")
    group.addoption("--batch", type=int, action="append", help="images per step; repeatable")
    group.addoption(
        "--seconds", type=float, default=480, help="time to stay within: repetitions follow it"
    )


def pytest_report_header() -> str:
    where = machine()
    note = "" if on_card() else " (no CUDA card: tiny sizes on the CPU, for the code alone)"
    return f"benchmarks on {where['card']}, commit {where['commit']}{note}"


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[Row], Row]:
    """Completes a row with card and versions, and adds it to the file of `--rows`."""
    where, path = machine(), request.config.getoption("--rows")

    def add(row: Row) -> Row:
        if not on_card() and row.provider.startswith("ours"):
            row = replace(row, note=" ".join(filter(None, (row.note, CPU_NOTE))))
        row = replace(row, **where)
        if path:
            append_row(path, row)
        return row

    return add


@pytest.fixture(scope="session")
def limits(record: Callable[[Row], Row]) -> Ceilings:
    """The ceilings of this machine, measured now and recorded as rows."""
    found = ceilings()
    dtype = "bfloat16" if on_card() else "float32"
    record(Row("copy", "torch", "ceiling", dtype="uint8", gb_s=found.bandwidth / 1e9))
    record(Row("product", "torch", "ceiling", dtype=dtype, tflop_s=found.peak / 1e12))
    return found


@pytest.fixture(scope="session")
def seconds_left(request: pytest.FixtureRequest) -> Callable[[], float]:
    """How much of `--seconds` is left."""
    end = time.monotonic() + request.config.getoption("--seconds")
    return lambda: end - time.monotonic()
