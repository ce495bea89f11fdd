"""Two commits measured in turn on this machine, each from a git worktree of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from anima_fast.bench.choice import Choice
from anima_fast.bench.environment import ROOT
from anima_fast.bench.groups import Group
from anima_fast.bench.run import run_groups
from anima_fast.bench.run_file import Run, read_run
from anima_fast.errors import UserError

# How often each commit is measured where times are taken: its samples are paired by round.
ROUNDS = 3


def is_commit(text: str) -> bool:
    """Whether git knows a commit by this name in the checkout that this program runs from."""
    return bool(_git("rev-parse", "--verify", "--quiet", f"{text}^{{commit}}"))


def run_both(
    names: tuple[str, str], groups: list[Group], choice: Choice, *, say: Callable[[str], None]
) -> tuple[Run, Run]:
    """Measure two commits: group by group, one commit after the other.

    Args:
        names: what git calls them.
        groups: to measure.
        choice: what of them.
        say: a line for each group as it ends.

    Raises:
        UserError: no such commit, or one from before `bench run`; a group failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="anima-fast-compare-") as folder,
        contextlib.ExitStack() as s,
    ):
        roots = [
            s.enter_context(worktree(name, Path(folder) / str(i))) for i, name in enumerate(names)
        ]
        runs: list[list[Run]] = [[], []]
        for group in groups:
            for turn in range(ROUNDS if group.turns else 1):
                found = []
                for i, root in enumerate(roots):
                    path = Path(folder) / f"{i}-{group.name}-{turn}.jsonl"
                    _, problems = run_groups(
                        [group], choice, path, root=root,
                        say=partial(_say_of, names[i], say),
                    )  # fmt: skip
                    if problems and i:
                        raise UserError(f"{names[i]}: {problems[0]}")
                    if problems:
                        # An older commit may not know how: nothing to compare with.
                        say(f"{names[i]}: {group.name} is left out")
                        break
                    found.append(read_run(path))
                if len(found) < len(roots):
                    break
                for one, run in zip(runs, found, strict=True):
                    one.append(run)
    if not runs[0]:
        raise UserError(f"nothing could be measured of {names[0]}")
    first, second = (_joined(name, some) for name, some in zip(names, runs, strict=True))
    return first, second


def _say_of(name: str, say: Callable[[str], None], line: str) -> None:
    say(f"{name}: {line}")


def _joined(name: str, runs: list[Run]) -> Run:
    """One run of several: samples of the same measurement one after the other."""
    rows: dict = {}
    for run in runs:
        for row in run.rows:
            if row.key in rows and row.samples:
                row = dataclasses.replace(row, samples=(*rows[row.key].samples, *row.samples))
            rows[row.key] = row
    return Run(runs[0].environment, tuple(rows.values()), name)


@contextlib.contextmanager
def worktree(name: str, folder: Path) -> Iterator[Path]:
    """A checkout of a commit, removed afterwards.

    Raises `UserError` for what is no commit, or one that has no `bench run`.
    """
    if not is_commit(name):
        raise UserError(f"{name} is neither a run file nor a commit of {ROOT}")
    _git("worktree", "add", "--detach", "--force", str(folder), name)
    try:
        if not (folder / "anima_fast/bench/groups.py").exists():
            raise UserError(
                f"commit {name} is older than `bench run`: measure it with its own commands"
            )
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
