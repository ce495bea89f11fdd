"""What `bench run`, `compare` and `profile` do once their words are read: exit statuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from anima_fast.bench import compare as comparison
from anima_fast.bench.baseline import judged
from anima_fast.bench.choice import Choice
from anima_fast.bench.commits import is_commit, run_both
from anima_fast.bench.environment import environment
from anima_fast.bench.groups import chosen, unmet
from anima_fast.bench.page import comparison_page
from anima_fast.bench.run import default_name, remarks, run_groups, wrong
from anima_fast.bench.run_file import Run, read_run
from anima_fast.bench.summary import summary
from anima_fast.bench.tables import table
from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.progress import Bars

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
    where = environment()
    path = out or default_name(where)
    # Before the first measurement, which may take minutes.
    check_folder(path.parent)
    with Bars() as bars:
        rows, problems = run_groups(
            groups, choice, path, say=say, show=lambda name, rows: bars.show(name, rows, None)
        )
    problems += [f"{word}: nothing of it was measured here" for word in unmet(choice, rows)]
    problems += unable + wrong(rows)
    for line in (*summary(rows), *remarks(rows)):
        say(line)
    good = say_changes(baselines, Run(where, tuple(rows), "this run"), whole=not choice.quick,
                       say=say)  # fmt: skip
    for problem in problems:
        say(f"problem: {problem}")
    say(f"{len(rows)} measurements in {path}")
    return 0 if good and not problems else 1


def say_changes(baselines: Sequence[Run], run: Run, *, whole: bool, say: Say) -> bool:
    """Compare a run with baselines, each in what it has; whether nothing is worse."""
    good, known = True, {key for stored in baselines for key in stored.by_key()}
    for stored in baselines:
        keys = stored.by_key()
        own = tuple(row for row in run.rows if row.key in keys)
        changes = judged(stored, replace(run, rows=own), whole=whole)
        say(f"against {stored.name}:")
        say(comparison.report(comparison.notes_of(stored, run), changes))
        good &= not comparison.failed(changes)
    new = [row for row in run.rows if row.key not in known]
    if new and baselines:
        say(f"in no baseline: {new[0]}" + (f" and {len(new) - 1} more" if new[1:] else ""))
    return good


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
        further, _ = chosen(replace(choice, quick=False))
        groups += [group for group in further if group.turns and group not in groups]
        first, second = run_both((a, b), groups, choice, say=say)
    found = comparison.compare(first, second, limits)
    say(comparison.report(comparison.notes_of(first, second), found))
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
    if not against:
        return 0
    run = Run(environment(), tuple(rows), "this run")
    return 0 if say_changes(read_some(against), run, whole=False, say=say) else 1
