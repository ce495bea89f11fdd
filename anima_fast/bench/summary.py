"""What a run found, on one screen: speed-ups, errors, losses, counts, each at its worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from anima_fast.bench.compare import number, ratio_interval
from anima_fast.bench.metrics import METRICS
from anima_fast.bench.run_file import Measurement
from anima_fast.bench.tables import table

COUNTS = ("launches", "units", "kept", "peak")
COMPILED = ("registers", "spills", "occupancy", "instructions", "compile")


def summary(rows: Sequence[Measurement]) -> Iterator[str]:
    """The tables of a run."""
    times: dict[tuple[str, str], dict[str, dict[str, Measurement]]] = {}
    for row in rows:
        if row.metric == "time" and row.samples:
            cases = times.setdefault((row.op, row.mode), {})
            cases.setdefault(f"{row.case} {row.dtype}", {})[row.provider] = row
    if times:
        lines = [line for key, cases in times.items() for line in _speeds(*key, cases)]
        header = ("time", "mode", "provider", "cases", "ms", "x eager", "x best rival",
                  "of ceiling")  # fmt: skip
        yield table(header, lines, left=3)
    whose = dict.fromkeys(row.provider for row in rows if row.metric == "error")
    for title, keys, columns, column in (
        ("error", ("op", "dtype"), tuple(whose), "provider"),
        ("loss", ("provider", "mode"), ("loss",), "metric"),
        ("whole", ("op", "provider", "case", "dtype"), COUNTS, "metric"),
        ("compiled", ("op", "provider", "mode"), COMPILED, "metric"),
        ("start", ("case",), ("modules", "startup"), "metric"),
    ):
        metrics = ("error",) if column == "provider" else columns
        found = [row for row in rows if row.metric in metrics]
        if columns == COUNTS:
            # Those of ops are many: they are in the file.
            found = [row for row in found if row.op in ("block", "step")]
        if found:
            there = {getattr(row, column) for row in found}
            columns = tuple(name for name in columns if name in there)
            yield table((title, *columns), _worst(found, keys, columns, column))


def _worst(
    rows: Sequence[Measurement], keys: Sequence[str], columns: Sequence[str], column: str
) -> Iterator[tuple[str, ...]]:
    """A line for each value of `keys`, with the worst of each column."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        # The whole of forward and backward, where there is one.
        if row.value is not None and row.mode not in ("fwd", "bwd"):
            line = found.setdefault(tuple(getattr(row, key) for key in keys), {})
            worse = min if METRICS[row.metric].better == "more" else max
            name = getattr(row, column)
            line[name] = worse(line.get(name, row.value), row.value)
    for key, values in found.items():
        cells = (number(values[c]) if c in values else "" for c in columns)
        yield " ".join(word for word in key if word not in ("", "own")), *cells


def _speeds(
    op: str, mode: str, cases: Mapping[str, Mapping[str, Measurement]]
) -> Iterator[tuple[str, ...]]:
    """A line for each of our providers: from the smallest to the largest figure of its cases, a
    ratio with its interval."""
    for name in dict.fromkeys(name for found in cases.values() for name in found):
        if not name.startswith("own") and ":" not in name:
            continue
        mine: list[float] = []
        eager: list[float] = []
        best: list[float] = []
        shares: list[float] = []
        for found in cases.values():
            if name not in found:
                continue
            row = found[name]
            rivals = [r for n, r in found.items() if not n.startswith("own") and n != "eager"]
            rival = min(
                (r for r in rivals if ":" not in r.provider),
                key=lambda row: row.known,
                default=None,
            )
            mine.append(1e3 * row.known)
            eager += _speedup(found.get("eager"), row)
            best += _speedup(rival, row)
            shares += [row.parts[k] for k in ("share_of_ceiling",) if k in row.parts]
        yield (op, mode, name, str(len(mine)), _range(mine, "{:.3f}"), _range(eager, "{:.2f}"),
               _range(best, "{:.2f}"), _range(shares, "{:.0%}"))  # fmt: skip


def _range(values: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(form.format(end) for end in (min(values), max(values))) if values else ()
    return " to ".join(ends)


def _speedup(other: Measurement | None, own: Measurement) -> tuple[float, ...]:
    """Both ends of the 95 % interval of the ratio of samples taken in turn; () without samples."""
    if other is None or not other.samples:
        return ()
    return ratio_interval(own.samples, other.samples)
