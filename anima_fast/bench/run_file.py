"""A run file: what one run measured, one JSON object a line, the environment in the first.

    {"format": "anima-fast run", "version": 1, "environment": {"card": ..., "commit": ...}}
    {"op": "gelu", "metric": "time", "case": "B=1 L=4096 D=8192", "provider": "own", ...}

Errors, times, memory, launches, registers, losses and start-up are rows of the same file, told
apart by `metric`; `bench compare`, `history` and the stored baselines read nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import disk_error, write_text

FORMAT, VERSION = "anima-fast run", 1
# Where a number comes from: the kernel ran on a card, or in Triton's interpreter; or it was read
# off compiled code, or is about the host alone.
SOURCES = ("card", "interpreter", "compiler", "host")


@dataclass(frozen=True)
class Measurement:
    """One number, or one family of numbers, of one run.

    Attributes:
        op: of the registry, or block, step, loss, program: what was measured.
        metric: what of it; one of `metrics.METRICS`.
        value: the number: the median of `samples`, the worst of `parts`, or measured once. None
            where it could not be measured; `note` says why.
        unit: of the value and the samples: s, bytes, launches, registers, ...
        case: sizes as text, such as "B=1 L=4096 D=8192".
        dtype: of activations, as torch names it.
        provider: who did the work: own, eager, compile, a library or a candidate.
        mode: fwd, bwd, both; of an error the tensor; of resources the architecture.
        samples: repeated measurements of `value`.
        parts: what the value is the worst or the sum of, by name: an error by case, launches by
            kernel, registers by variant.
        source: one of `SOURCES`.
        note: why a number is missing, or what it is.
    """

    op: str
    metric: str
    value: float | None
    unit: str = ""
    case: str = ""
    dtype: str = ""
    provider: str = "own"
    mode: str = ""
    samples: tuple[float, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)
    source: str = "host"
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of two runs the same measurement."""
        return (self.op, self.metric, self.mode, self.case, self.dtype, self.provider)

    @property
    def known(self) -> float:
        """The value; NaN where it could not be measured."""
        return math.nan if self.value is None else self.value

    def __str__(self) -> str:
        words = (self.op, self.provider, self.mode, self.case, self.dtype, self.metric)
        return " ".join(word for word in words if word and word != "own")


def sampled(row: Measurement, samples: Iterable[float]) -> Measurement:
    """`row` with these samples and their median as its value."""
    samples = tuple(samples)
    return dataclasses.replace(row, samples=samples, value=statistics.median(samples))


def ratio(row: Measurement, other: Measurement) -> float:
    """The median of `other` over `row`, sample by sample: how much faster `row` is, of times."""
    pairs = zip(row.samples, other.samples, strict=True)
    return statistics.median(b / a for a, b in pairs)


@dataclass(frozen=True)
class Run:
    """A run file in memory.

    Attributes:
        environment: of `environment.environment()`.
        rows: in the order of the file.
        name: what to call it: its path.
        cut: whether the last line was cut off by a kill; it is left out.
    """

    environment: Mapping[str, Any]
    rows: tuple[Measurement, ...]
    name: str = ""
    cut: bool = False

    def by_key(self) -> dict[tuple[str, ...], Measurement]:
        """Rows by what they measure; a later one of the same key wins."""
        return {row.key: row for row in self.rows}


def header(environment: Mapping[str, Any]) -> str:
    """The first line of a run file."""
    return _line({"format": FORMAT, "version": VERSION, "environment": environment})


def row_line(row: Measurement) -> str:
    """The line of a row; fields with their defaults are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(Measurement)} | {"parts": {}}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(Measurement)}
    return _line({k: v for k, v in values.items() if k == "value" or v != defaults[k]})


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=True) + "\n"


def write_run(path: Path, environment: Mapping[str, Any], rows: Iterable[Measurement]) -> None:
    """Write a run file at once. Raises `UserError` when it cannot be written."""
    write_text(path, header(environment) + "".join(map(row_line, rows)))


class RunWriter:
    """A run file that grows row by row, so that a run that is killed keeps what it has.

    The file starts as `PATH` with its header, replacing an older one. Raises `UserError` when it
    cannot be written.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self.path = path
        write_run(path, environment, ())

    def add(self, rows: Iterable[Measurement]) -> None:
        """Append rows."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(map(row_line, rows))
        except OSError as error:
            raise disk_error(error, self.path) from error


def read_run(path: Path) -> Run:
    """Read a run file; a last line without its end is left out (`Run.cut`).

    Raises:
        UserError: no such file, not a run file, of another version, or a damaged line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a run file: {error}") from error
    lines = text.split("\n")
    cut = bool(lines.pop())
    if not lines:
        raise UserError(f"{path} is empty or cut before its first line's end: no run is in it")
    first = _parsed(lines[0], f"{path}, line 1,")
    if first.get("format") != FORMAT:
        raise UserError(f"{path} is no run file: `anima-fast bench run --out FILE` writes one")
    if first.get("version") != VERSION:
        raise UserError(
            f"{path} has version {first.get('version')} of the format, this program reads "
            f"{VERSION}: measure again with one program, or compare the commits instead"
        )
    where = first.get("environment")
    if not isinstance(where, dict):
        raise UserError(f"{path}, line 1, has no environment")
    rows = tuple(parse_row(line, f"{path}, line {i},") for i, line in enumerate(lines[1:], 2))
    return Run(where, rows, str(path), cut)


def parse_row(line: str, where: str) -> Measurement:
    """A measurement from its line. Raises `UserError` for another one; `where` is for its text."""
    values = _parsed(line, where)
    wrong = [
        name
        for name, value in values.items()
        if name not in KINDS or not isinstance(value, KINDS[name]) or not _numbers(value)
    ]
    if wrong or not values.keys() >= {"op", "metric", "value"}:
        what = f"its {wrong[0]} is {values[wrong[0]]!r}" if wrong else "op, metric or value lacks"
        raise UserError(f"{where} is no measurement: {what}")
    return Measurement(**{**values, "samples": tuple(values.get("samples", ()))})


# What JSON has for each field.
KINDS: Mapping[str, Any] = {f.name: str for f in dataclasses.fields(Measurement)} | {
    "value": (int, float, type(None)), "samples": list, "parts": dict,
}  # fmt: skip


def _numbers(value: Any) -> bool:
    """Whether what a list or an object holds are numbers."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(isinstance(one, int | float) for one in inside)


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object")
    return value
