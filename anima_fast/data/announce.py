"""What `train` says about its data before anything is encoded: every finding, one line per kind.

`anima-fast dataset` shows the same findings file by file, and those that need all pixels.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from anima_fast.data.cache_folders import printable
from anima_fast.data.findings import plan_problems
from anima_fast.data.folders import folder_problems, mask_problems
from anima_fast.data.items import DatasetPlan
from anima_fast.data.layouts import some
from anima_fast.data.plan import build_plan
from anima_fast.data.problems import KINDS, Problem
from anima_fast.data.transparency import alpha_problems
from anima_fast.errors import UserError
from anima_fast.options.kinds import pair_text
from anima_fast.options.run import AnyRun


def announced_plan(options: AnyRun, say: Callable[[str], None]) -> DatasetPlan:
    """The plan of a run, after its notices and findings were said; the plan keeps the findings.

    Raises `UserError` that names every file which training cannot go on with and, under
    `strict_data`, every finding.
    """
    problems: list[Problem] = []
    plan = build_plan(options, problems)
    problems += plan_problems(plan, None) + folder_problems(plan.datasets)
    problems += mask_problems([*plan.items, *plan.validation_items])
    looked, unseen = alpha_problems(plan, everything=options.strict_data)
    plan.problems = list(dict.fromkeys(problems + looked))
    if unseen:
        plan.notices.append(
            f"{unseen} more images have an alpha channel, which `anima-fast dataset` looks at"
        )
    listed = f"`anima-fast dataset {_data_words(options)}` lists them"
    if stopping := [problem for problem in plan.problems if problem.stops]:
        raise UserError(f"the data cannot be trained: {'; '.join(lines(stopping))}; {listed}")
    if options.strict_data and plan.problems:
        raise UserError(f"--strict_data: {'; '.join(lines(plan.problems))}; {listed}")
    for notice in plan.notices:
        say(notice)
    for line in lines(plan.problems):
        say(line)
    if plan.problems:
        say(listed)
    return plan


def lines(problems: Iterable[Problem]) -> list[str]:
    """One line for each kind: what it is, how many, the first (the first few of what stops)."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.kind].append(problem)
    found = []
    for kind, about in KINDS.items():
        if mine := groups.get(kind):
            named = some([_described(problem) for problem in mine], 3 if about.stops else 1)
            found.append(f"{about.title}: {len(mine)} ({named}): {about.remedy}")
    return found


def _described(problem: Problem) -> str:
    name = printable(Path(problem.file).name)
    return f"{name}: {problem.text}" if name and problem.text else name or problem.text


def _data_words(options: AnyRun) -> str:
    """The options that name the data, as they are typed."""
    if options.dataset_config:
        return shlex.quote(printable(options.dataset_config))
    names = ("train_data_dir", "reg_data_dir", "in_json")
    given = {name: getattr(options, name) for name in names}
    given["resolution"] = pair_text(options.resolution)
    return " ".join(f"--{n} {shlex.quote(printable(v))}" for n, v in given.items() if v)
