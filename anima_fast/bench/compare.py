"""What moved between two runs, and whether it may.

A number that repeats to the digit is compared exactly: any difference is the code's. Times are
compared by the ratios of samples that were taken one after the other, with a bootstrap interval;
a time is worse only when the whole interval lies beyond the limit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anima_fast.bench.environment import differences
from anima_fast.bench.metrics import METRICS
from anima_fast.bench.run_file import Measurement, Run
from anima_fast.bench.tables import table
from anima_fast.errors import UserError

# From the best news to the worst, as a table orders them from below.
SAME, NEW, GONE, CHANGED, BETTER, LOST, WORSE = (
    "same", "only in the second", "only in the first", "changed", "better", "lost", "worse",
)  # fmt: skip
SEVERITY = (WORSE, LOST, BETTER, CHANGED, NEW, GONE, SAME)
FAILING = (WORSE, LOST)
# Another processor, numpy or torch rounds otherwise: the limit is at least this there. A run of the
# trainer reads texts that were encoded in 16 bit (measured: a thousandth). On a card libraries
# choose their kernels, and sums have another order, so errors have this much from run to run.
ELSEWHERE = {"error": 0.20, "loss": 0.02}
# And what it may add to an error of a few roundings or none at all: another exponential, another
# order of a sum, products without a fused multiply-add (measured: two epsilons of float32). Slips
# of a formula show in float64 and further roundings in 16 bit, so float32 can afford it. In
# float64, where a slip is a million times as large, this much is never worse, here or elsewhere.
SLACK = {"float64": 4 * 2.0**-52, "float32": 4 * 2.0**-23}
RESAMPLES, CONFIDENCE = 2000, 0.95
MOST_LINES, MOST_LOOSE = 40, 10


@dataclass(frozen=True)
class Change:
    """One number in two runs.

    Attributes:
        row: the measurement, of the second run where it has it.
        part: the name of the part, "" for the row's own value.
        before, after: None where a run has no such number.
        verdict: one of `SEVERITY`.
        interval: of the ratio after / before, for times.
        more: how many other parts of the row moved too, less than this one.
    """

    row: Measurement
    part: str
    before: float | None
    after: float | None
    verdict: str
    interval: tuple[float, float] | None = None
    more: int = 0

    @property
    def name(self) -> str:
        """The measurement, with the part in brackets."""
        return f"{self.row}" + (f" [{self.part}]" if self.part else "")

    @property
    def ratio(self) -> float:
        """after / before; NaN where there is none."""
        if self.before is None or self.after is None or not self.before:
            return math.nan
        return self.after / self.before


def limits_of(words: Iterable[str]) -> dict[str, float]:
    """Limits by metric: those of `METRICS`, and `--fail-if` "time:5% error:5% registers:0".

    Raises `UserError` for a word that is none.
    """
    limits = {name: metric.limit for name, metric in METRICS.items() if metric.limit is not None}
    for word in " ".join(words).replace(",", " ").split():
        name, _, text = word.partition(":")
        if name not in METRICS:
            raise UserError(f"--fail-if {word}: use one of {', '.join(METRICS)}, as in time:5%")
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:
            raise UserError(f"--fail-if {word}: expected a share such as {name}:5% or {name}:0")
        limits[name] = share
    return limits


def compare(a: Run, b: Run, limits: Mapping[str, float]) -> list[Change]:
    """Every number of both runs, worst first; rows that moved in several parts come once."""
    elsewhere = bool(differences(a.environment, b.environment))
    before, after = a.by_key(), b.by_key()
    found = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        row = new or old
        assert row is not None
        limit = limits.get(row.metric)
        if (elsewhere or row.source == "card") and limit is not None and not _settled(row):
            limit = max(limit, ELSEWHERE.get(row.metric, 0.0))
        slack = 0.0
        if row.metric == "error" and (elsewhere or row.dtype == "float64"):
            slack = SLACK.get(row.dtype, 0.0)
        found.append(_worst(list(_changes(old, new, limit, slack))))
    return sorted(found, key=lambda c: (SEVERITY.index(c.verdict), -abs(_log(c.ratio))))


def _settled(row: Measurement) -> bool:
    """Whether an error is the same on any processor.

    In 16 bit it is that of the last rounding, of sums that the interpreter makes in float32:
    measured without vector units and fused multiply-adds, it moved by two in a hundred thousand.
    """
    half = row.dtype in ("float16", "bfloat16")
    return row.metric == "error" and row.source == "interpreter" and half


def _worst(changes: Sequence[Change]) -> Change:
    """The change of a row that says most, with the number of the others that moved."""
    moved = [c for c in changes if c.verdict != SAME]
    if not moved:
        return changes[0]
    first = min(moved, key=lambda c: (SEVERITY.index(c.verdict), -abs(_log(c.ratio))))
    return replace(first, more=len(moved) - 1)


def _log(ratio: float) -> float:
    return math.inf if not ratio > 0 else math.log(ratio)


def _changes(
    old: Measurement | None, new: Measurement | None, limit: float | None, slack: float
) -> Iterator[Change]:
    if old is None or new is None:
        row = new or old
        assert row is not None
        verdict = NEW if old is None else GONE
        yield Change(row, "", old.value if old else None, new.value if new else None, verdict)
        return
    metric = METRICS.get(new.metric)
    if metric is None:
        raise UserError(f"{new}: the metric {new.metric!r} is unknown to this version")
    if not metric.exact and old.samples and new.samples:
        yield _timed(old, new, limit)
        return
    direction = {"less": 1, "more": -1, "": 0}[metric.better]
    judged = limit if metric.exact else None
    # A value that is the worst of its parts says nothing beyond them, and another where the two
    # runs have other parts.
    derived = metric.exact and metric.parts != "shown" and old.parts and new.parts
    if new.source == "compiler" and old.parts.keys().isdisjoint(new.parts):
        # Every variant has another name, as a kernel got one more constant: the worst is judged.
        derived = False
    if not derived:
        yield _number(new, "", old.value, new.value, judged, direction, slack)
    if not metric.exact:
        return
    absent = 0.0 if metric.parts == "counted" else None
    for part in dict.fromkeys((*old.parts, *new.parts)):
        change = _number(
            new, part, old.parts.get(part, absent), new.parts.get(part, absent),
            None if metric.parts == "shown" else judged, direction, slack,
        )  # fmt: skip
        # A case or a variant that is no longer there is told, and fails nothing.
        yield replace(change, verdict=GONE) if change.after is None else change


def _number(
    row: Measurement, part: str, before: float | None, after: float | None,
    limit: float | None, direction: int, slack: float,
) -> Change:  # fmt: skip
    return Change(row, part, before, after, verdict_of(before, after, limit, direction, slack))


def verdict_of(
    before: float | None,
    after: float | None,
    limit: float | None,
    direction: int = 1,
    slack: float = 0.0,
) -> str:
    """The verdict on two values of one number.

    Args:
        before, after: None where there is no such number; one that went is lost.
        limit: the relative change for the worse that is accepted; None accepts any.
        direction: 1 where less is better, -1 where more is, 0 where any change is for the worse.
        slack: a difference that is never for the worse.
    """
    if before is None or after is None:
        if before is None:
            return SAME if after is None else NEW
        return LOST
    if before == after or (math.isnan(before) and math.isnan(after)):
        return SAME
    if math.isnan(after):
        return LOST
    change = (after - before) / abs(before) if before else math.copysign(math.inf, after)
    worse = abs(change) if not direction else direction * change
    if abs(after - before) <= slack:
        return CHANGED
    if limit is not None and worse > limit:
        return WORSE
    return BETTER if limit is not None and direction and -worse > limit else CHANGED


def _timed(old: Measurement, new: Measurement, limit: float | None) -> Change:
    low, high = ratio_interval(old.samples, new.samples)
    verdict, told = SAME, 1 + METRICS[new.metric].told
    if low > told or high < 1 / told:
        verdict = CHANGED
        if limit is not None and low > 1 + limit:
            verdict = WORSE
        elif limit is not None and high < 1 / (1 + limit):
            verdict = BETTER
    return Change(new, "", old.value, new.value, verdict, (low, high))


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median of b / a, over samples taken in pairs.

    Runs of two files were not taken in turn; theirs are paired in order, which is as good as any.
    """
    count = min(len(a), len(b))
    ratios = np.asarray(b[:count]) / np.asarray(a[:count])
    # Seeded: the same two files always give the same interval.
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def failed(changes: Iterable[Change]) -> bool:
    """Whether anything is worse than its limit allows."""
    return any(c.verdict in FAILING for c in changes)


def summary(changes: Sequence[Change]) -> str:
    """How many numbers have which verdict."""
    counts = Counter(c.verdict for c in changes)
    words = [f"{counts[v]} {v}" for v in SEVERITY if counts[v]]
    return f"{len(changes)} measurements compared: {', '.join(words) or 'none'}"


def number(value: float | None) -> str:
    """Four significant digits; "–" for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    whole = abs(value) < 1e9 and value == int(value)
    return f"{value:.0f}" if whole else f"{value:.4g}"


def change_text(change: Change) -> str:
    """The change as a percentage, with the interval of a time."""
    if change.interval:
        low, high = (f"{100 * (ratio - 1):+.1f}" for ratio in change.interval)
        return f"{100 * (change.ratio - 1):+.1f} % [{low}, {high}]"
    if math.isnan(change.ratio):
        return ""
    return f"x{change.ratio:.3g}" if change.ratio >= 2 else f"{100 * (change.ratio - 1):+.2g} %"


def lines(changes: Sequence[Change], most: int | None = MOST_LINES) -> Iterator[tuple[str, ...]]:
    """Cells of what moved: verdict, what, before, after, change."""
    moved = [c for c in changes if c.verdict not in (SAME, NEW, GONE)]
    for change in moved[:most]:
        what = change.name + (f" and {change.more} more" if change.more else "")
        yield (change.verdict, what, number(change.before), number(change.after),
               change_text(change))  # fmt: skip
    if most is not None and len(moved) > most:
        yield (
            "",
            f"... {len(moved) - most} more: `bench compare A B --html FILE` shows all",
            "",
            "",
            "",
        )


def notes_of(a: Run, b: Run) -> list[str]:
    """What must be known about two runs before their numbers are read."""
    found = []
    if apart := differences(a.environment, b.environment):
        found.append(
            f"{a.name} comes from another environment ({', '.join(apart)}): a float32 "
            f"error may grow by {ELSEWHERE['error']:.0%}, a loss move by {ELSEWHERE['loss']:.0%}"
        )
    return found + [
        f"{run.name}: its last line was cut off and is left out" for run in (a, b) if run.cut
    ]


def report(notes: Iterable[str], changes: Sequence[Change]) -> str:
    """A comparison as text: the notes, what moved, what only one run has, how much is the same."""
    text = list(notes)
    if rows := list(lines(changes)):
        text.append(table(("", "what", "before", "after", "change"), rows, left=2))
    loose = [change for change in changes if change.verdict in (NEW, GONE)]
    text += [f"{change.verdict}: {change.name}" for change in loose[:MOST_LOOSE]]
    if len(loose) > MOST_LOOSE:
        text.append(f"... and {len(loose) - MOST_LOOSE} more that one of them has not")
    return "\n".join([*text, summary(changes)])
