"""What starting costs: the packages that `--help` imports, its seconds, and compiling kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.run_file import Measurement, sampled
from anima_fast.errors import UserError

# What packages import on an older Python alone.
BACKPORTS = {"tomli", "exceptiongroup", "importlib_metadata", "zipp", "typing_extensions"}
COMMANDS = ("--help", "train --help")
REPEATS = 3
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
    """The packages that two commands import."""
    for command in COMMANDS:
        found = packages(command)
        value = float(sum(found.values()))
        yield [Measurement("program", "modules", value, "packages", command, parts=found)]


def second_rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Seconds to the end of the process, of two commands."""
    for command in COMMANDS:
        samples = [_seconds(command) for _ in range(REPEATS)]
        yield [sampled(Measurement("program", "startup", None, "s", command), samples)]


def compile_rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Seconds that Triton takes for the kernels of each op at one shape, its cache empty."""
    import torch
    from triton import knobs

    from anima_fast.bench.cases import case_text, chosen_cases, implementations, timed_dtypes
    from anima_fast.bench.dry import dry_launches, run_op
    from anima_fast.bench.resources import FULL_ARCH
    from anima_fast.kernels.registry import OPS

    arch = (choice.archs or (FULL_ARCH,))[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        dry_launches(arch) as launches,
        knobs.cache.scope(),
    ):
        knobs.cache.dir = folder
        # The first compilation also loads the compiler.
        run_op(OPS["gelu"], {"B": 1, "L": 1, "D": 16}, torch.float64)
        for op in OPS.values():
            for provider, one in implementations(op, choice).items():
                if not choice.wants_op(op.name):
                    continue
                (_, sizes), dtype = next(chosen_cases(op, choice)), timed_dtypes(op, choice)[0]
                launches.clear()
                start = time.perf_counter()
                run_op(one, sizes, dtype)
                yield [Measurement(
                    op.name, "compile", time.perf_counter() - start, "s", case_text("", sizes),
                    name_of(dtype), provider, f"sm_{arch}",
                    note=f"{len({id(one.compiled) for one in launches})} kernels",
                )]  # fmt: skip


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
