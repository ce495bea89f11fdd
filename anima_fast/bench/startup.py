"""What starting the program costs: the packages that `--help` imports, and its seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from anima_fast.bench.choice import Choice
from anima_fast.bench.run_file import Measurement, sampled
from anima_fast.errors import UserError

# What packages import on an older Python alone.
BACKPORTS = {"tomli", "exceptiongroup", "importlib_metadata", "zipp", "typing_extensions"}
COMMANDS = ("--help", "train --help")
REPEATS = 5
LIST = """
import sys, runpy
sys.argv = ["anima-fast", *sys.argv[1:]]
try:
    runpy.run_module("anima_fast", run_name="__main__")
except SystemExit:
    pass
print("\\0" + "\\n".join(sys.modules))
"""


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Imported packages, and seconds to the end of the process, of two commands."""
    for command in COMMANDS:
        row = Measurement("program", "modules", None, "packages", command)
        found = packages(command)
        yield [replace(row, value=float(sum(found.values())), parts=found)]
        if not choice.quick:
            samples = [_seconds(command) for _ in range(REPEATS)]
            yield [sampled(replace(row, metric="startup", unit="s"), samples)]


def packages(command: str) -> dict[str, float]:
    """The packages that a command imports, beside our own and Python's, each as 1."""
    names = _run("-c", LIST, *command.split()).rpartition("\0")[2].split()
    tops = {name.partition(".")[0] for name in names}
    # Python's own differ with its version and with what a machine sets up at start.
    ours = sys.stdlib_module_names | BACKPORTS | {"anima_fast"}
    foreign = {top for top in tops - ours if not top.startswith("_")}
    return dict.fromkeys(sorted(foreign), 1.0)


def _seconds(command: str) -> float:
    start = time.perf_counter()
    _run("-m", "anima_fast", *command.split())
    return time.perf_counter() - start


def _run(*words: str) -> str:
    variables = dict(os.environ, COLUMNS="100", TERM="dumb")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=variables)
    if done.returncode:
        raise UserError(f"`{' '.join(words[-2:])}` failed: {done.stderr.strip()[-300:]}")
    return done.stdout
