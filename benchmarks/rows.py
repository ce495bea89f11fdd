"""Measurements as tidy rows: one line of CSV each, with where and when it was taken.

A row stands for itself: card, versions and commit are in every line, so files of several machines
can be put one under the other. Empty cells mean "does not apply" or "was not measured", never 0.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from anima_fast.errors import UserError
from anima_fast.files import disk_error, write_text

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("p20", "p50", "p80", "gb_s", "tflop_s", "share_of_ceiling")
COUNTS = ("tokens", "batch")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        op: name in the registry, or copy, product, block, step.
        provider: who did the work: eager, compiled, ours, …
        mode: what was measured: forward, forward+backward, saved, peak, …
        shape: sizes as text.
        dtype: of activations.
        p20, p50, p80: quantiles of repeated measurements in `unit`; a single value is p50 alone.
        unit: ms, s, MiB, GiB, images/s, launches, share, units.
        gb_s, tflop_s: 10⁹ bytes and 10¹² operations a second, from the registry's counts and p50.
        share_of_ceiling: least time at the ceilings measured in the same run, over p50.
        card, torch, triton, commit, date: where and when.
        tokens, batch: image tokens per sample, samples.
        note: why a number is missing, or what it is.
    """

    op: str
    provider: str
    mode: str
    shape: str = ""
    dtype: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    unit: str = ""
    gb_s: float | None = None
    tflop_s: float | None = None
    share_of_ceiling: float | None = None
    card: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    tokens: int | None = None
    batch: int | None = None
    note: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours.

    Raises `ValueError` without values.
    """
    if not values:
        raise ValueError("no values to take a quantile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80 of the values times `scale`."""
    shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {name: scale * quantile(values, share) for name, share in shares.items()}


def throughput(
    seconds: float, bytes_moved: float, flops: float, *, bandwidth: float, peak: float
) -> dict[str, float | None]:
    """gb_s, tflop_s and share_of_ceiling of one call; None where nothing is moved or multiplied.

    Args:
        seconds: of the call.
        bytes_moved, flops: of the call, by the registry.
        bandwidth, peak: the ceilings, bytes and operations a second.
    """
    least = max(bytes_moved / bandwidth, flops / peak)
    return {
        "gb_s": bytes_moved / seconds / 1e9 if bytes_moved else None,
        "tflop_s": flops / seconds / 1e12 if flops else None,
        "share_of_ceiling": least / seconds if least else None,
    }


def machine() -> dict[str, str]:
    """card, torch, triton, commit and date of this run; a CPU is named as one."""
    import torch
    import triton

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU: {_processor()}"
    return {
        "card": card,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def commit() -> str:
    """The short commit of the checkout, "+" behind it when files differ; "" outside of one."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if head and _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def append_row(path: Path, row: Row) -> None:
    """Add a line to a CSV file at once, so that a run that is killed keeps what it has.

    Raises `UserError` when the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists() or not path.stat().st_size
        with open(path, "a", encoding="utf-8", newline="") as file:
            _write(file, [row], header=new)
    except OSError as error:
        raise disk_error(error, path) from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a CSV file anew, at once; without rows it is a header.

    Raises `UserError` when the file cannot be written.
    """
    text = io.StringIO(newline="")
    _write(text, rows, header=True)
    write_text(path, text.getvalue())


def _write(file: TextIO, rows: Iterable[Row], *, header: bool) -> None:
    writer = csv.DictWriter(file, COLUMNS)
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()})


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; a line cut off by a kill is left out, no file means no rows.

    Raises `UserError` for a file with other columns.
    """
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path} has other columns than this version writes: delete it")
        found = (_parsed(line) for line in reader)
        return [row for row in found if row is not None]


def _parsed(line: Mapping[str, Any]) -> Row | None:
    if any(value is None for value in line.values()) or None in line:
        return None
    values: dict[str, Any] = dict(line)
    try:
        for name in NUMBERS:
            values[name] = float(line[name]) if line[name] else None
        for name in COUNTS:
            values[name] = int(line[name]) if line[name] else None
    except ValueError:
        return None
    return Row(**values)
