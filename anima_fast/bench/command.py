"""What `bench run`, `compare` and `profile` do once their words are read: exit statuses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from anima_fast.bench import compare as comparison
from anima_fast.bench.choice import Choice
from anima_fast.bench.commits import is_commit, run_both
from anima_fast.bench.environment import environment
from anima_fast.bench.groups import chosen
from anima_fast.bench.page import comparison_page
from anima_fast.bench.run import default_name, run_groups, wrong
from anima_fast.bench.run_file import Measurement, Run, read_run
from anima_fast.bench.tables import table
from anima_fast.errors import UserError
from anima_fast.files import check_folder

Say = Callable[[str], None]


def run_command(choice: Choice, out: Path | None, against: Path | None, *, say: Say) -> int:
    """Measure into `out`; the exit status."""
    groups, lacking = chosen(choice)
    unable = [f"{g.name}: {', '.join(g.metrics)} of {' '.join(g.ops) or 'ops'} need {g.needs}"
              for g in lacking]  # fmt: skip
    if not groups:
        for line in unable or ["nothing that is measured has all of these names"]:
            say(f"problem: {line}")
        return 1
    baselines = read_some(against) if against else []
    path = out or default_name(environment())
    # Before the first measurement, which may take minutes.
    check_folder(path.parent)
    rows, problems = run_groups(groups, choice, path, say=say)
    problems += unable + wrong(rows)
    for line in summary(rows):
        say(line)
    status = 0
    if baselines:
        run = Run(environment(), tuple(rows), str(path))
        found = against_all(baselines, run)
        say(comparison.report(baselines[0], run, found))
        status = int(comparison.failed(found))
    for problem in problems:
        say(f"problem: {problem}")
    say(f"{len(rows)} measurements in {path}")
    return 1 if problems else status


def against_all(baselines: Sequence[Run], run: Run) -> list[comparison.Change]:
    """A run compared with every baseline; what only one side has is left out."""
    limits, found = comparison.limits_of(()), []
    for baseline in baselines:
        known = baseline.by_key().keys() & run.by_key().keys()
        first, second = (
            dataclasses.replace(one, rows=tuple(row for row in one.rows if row.key in known))
            for one in (baseline, run)
        )
        found += comparison.compare(first, second, limits)
    return sorted(found, key=lambda change: comparison.SEVERITY.index(change.verdict))


def read_some(path: Path) -> list[Run]:
    """The run of a file, or all of a folder. Raises `UserError` when there is none."""
    if not path.is_dir():
        return [read_run(path)]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise UserError(f"{path} holds no run file (*.jsonl)")
    return [read_run(file) for file in files]


def compare_command(
    a: str, b: str, fail_if: Sequence[str], html: Path | None, choice: Choice, *, say: Say
) -> int:
    """Compare two run files or two commits; the exit status."""
    limits = comparison.limits_of(fail_if)
    files = [Path(name).exists() for name in (a, b)]
    if all(files):
        first, second = read_run(Path(a)), read_run(Path(b))
    elif any(files):
        name = b if files[0] else a
        what = "is a commit, the other a file" if is_commit(name) else "does not exist"
        raise UserError(f"{name} {what}: give two run files, or two commits")
    else:
        groups, _ = chosen(choice)
        first, second = run_both((a, b), groups, choice, say=say)
    found = comparison.compare(first, second, limits)
    say(comparison.report(first, second, found))
    if html:
        comparison_page(html, first, second, found)
        say(f"wrote {html}")
    return int(comparison.failed(found))


def profile_command(op: str, tool: str, choice: Choice, against: Path | None, *, say: Say) -> int:
    """Profile an op or the step; the exit status."""
    from anima_fast.bench import profile

    if tool not in profile.TOOLS:
        raise UserError(f"--tool {tool} is unknown: use one of {', '.join(profile.TOOLS)}")
    if op in ("loss", "program"):
        raise UserError(f"{op} has no profile: use an op of the registry, block or step")
    if op == "block" and tool != "sass":
        # Counted, so that no card is needed.
        from anima_fast.bench.launches import timeline

        for line in timeline(choice):
            say(line)
        return 0
    if tool == "sass":
        return _sass(choice, against, say)
    if against:
        raise UserError("--against is for --tool sass: `bench compare` compares times")
    profile.check(tool, op, choice)
    if tool == "proton":
        lines = profile.step_text(choice).splitlines() if op == "step" else profile.under_proton(
            op, choice)  # fmt: skip
        for line in lines:
            say(line)
        return 0
    words = profile.command(tool, op, choice)
    say(profile.shown(words))
    return profile.run(words)


def _sass(choice: Choice, against: Path | None, say: Say) -> int:
    from anima_fast.bench import sass

    rows = [row for some in sass.rows(choice) for row in some]
    if not rows:
        raise UserError("nothing is compiled for this: give an op of the registry, or block")
    for row in rows:
        say(f"{row}: {row.value:.0f} instructions {row.note}".rstrip())
        parts = sorted(row.parts.items(), key=lambda part: -part[1])
        say(table(("class", "count"), [(f"  {name}", f"{n:.0f}") for name, n in parts]))
    if against:
        run = Run(environment(), tuple(rows), "this machine")
        found = against_all(read_some(against), run)
        say(comparison.report(read_some(against)[0], run, found))
    return 0


def summary(rows: Sequence[Measurement]) -> Iterator[str]:
    """What a run found, on one screen: for each op times and speed-ups, else the worst values."""
    times: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for row in rows:
        if row.metric == "time" and row.samples:
            times.setdefault((row.op, row.case, row.mode), {})[row.provider] = row
    if times:
        lines = [line for key, found in times.items() for line in _speeds(key, found)]
        yield table(("op", "case", "mode", "own ms", "x eager", "x best rival", "of ceiling"),
                    lines, left=3)  # fmt: skip
    counts = Counter(row.metric for row in rows)
    for metric, count in counts.items():
        if metric in ("launches", "units", "kept", "peak", "loss", "modules"):
            for row in (r for r in rows if r.metric == metric and r.mode in ("", "both")):
                yield f"{row}: {comparison.number(row.value)} {row.unit}"
        elif metric != "time":
            yield f"{metric}: {count} rows"


def _speeds(key: tuple[str, ...], found: dict[str, Measurement]) -> Iterator[tuple[str, ...]]:
    """A line for each of our providers: against eager, and against the fastest other."""
    rivals = {n: r for n, r in found.items() if not n.startswith("own") and n != "eager"}
    best = min(rivals.values(), key=lambda row: row.value or 0, default=None)
    for name, row in found.items():
        if not name.startswith("own") and ":" not in name:
            continue
        op, case, mode = key
        label = op if name == "own" else f"{op} {name.removeprefix('own ')}"
        against_best = f"{_speedup(best, row)} {best.provider}" if best else ""
        share = row.parts.get("share_of_ceiling")
        yield (label, case, mode, f"{1e3 * (row.value or 0):.3f}",
               _speedup(found.get("eager"), row), against_best,
               "" if share is None else f"{share:.0%}")  # fmt: skip


def _speedup(other: Measurement | None, own: Measurement) -> str:
    """The median ratio of samples taken in turn; "" where the other has none."""
    if other is None or not other.samples:
        return ""
    low, high = comparison.ratio_interval(own.samples, other.samples)
    return f"{(low * high) ** 0.5:.2f}"
