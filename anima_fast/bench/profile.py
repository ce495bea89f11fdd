"""One op, or the training step, under a profiler.

    python -m anima_fast.bench.profile OP [--case L=4096] [--dtype float16] [--provider own]

runs an op (forward and backward, or `step`) once between cudaProfilerStart and -Stop, for a tool
that starts programs: ncu, nsys. proton comes with Triton and runs in this process; torch's own
profiler answers for the step: phases, gaps in which the card waits for the host. How long the step
waits for its data is timed without a profiler, with the trainer's own loader (loading.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from anima_fast.bench.cases import case_text, chosen_cases, timed_dtypes
from anima_fast.bench.choice import Choice, parse_choice
from anima_fast.bench.providers import COMPILE, EAGER, OWN, providers
from anima_fast.bench.tables import table
from anima_fast.bench.times import DEVICE, Call, trained
from anima_fast.errors import UserError
from anima_fast.kernels.registry import OPS
from anima_fast.measure.timer import synchronize

TOOLS = ("proton", "ncu", "nsys", "sass")
# Both start at cudaProfilerStart, after the warm-up.
COMMANDS = {
    "ncu": "ncu --set full --profile-from-start off --target-processes all",
    "nsys": "nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi "
    "--capture-range-end stop --stats true --force-overwrite true -o {op}-profile",
}
SOURCES = {"ncu": "Nsight Compute", "nsys": "Nsight Systems"}
# Of the whole step, where op by op `providers` are meant.
STEP_PROVIDERS = (OWN, EAGER, COMPILE)
WARM = 3


def command(tool: str, op: str, choice: Choice) -> list[str]:
    """The words of the command line that profiles an op under ncu or nsys."""
    given = {
        "--case": [f"{letter}={size}" for letter, size in choice.sizes.items()],
        "--dtype": choice.dtypes,
        "--provider": choice.providers,
    }
    options = [f"{name}={','.join(values)}" for name, values in given.items() if values]
    words = COMMANDS[tool].format(op=op).split()
    return [*words, sys.executable, "-m", "anima_fast.bench.profile", op, *options]


def shown(words: Sequence[str]) -> str:
    """A command line as this system's shell takes it."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def check(tool: str, op: str, choice: Choice) -> None:
    """Raise `UserError`, with what to type where it works, when a tool cannot run here."""
    outside = tool in COMMANDS
    if outside and len(choice.providers) > 1:
        raise UserError(f"--tool {tool} shows one --provider at a time")
    words = shown(command(tool, op, choice)) if outside else f"anima-fast bench profile {op}"
    if not torch.cuda.is_available():
        raise UserError(f"--tool {tool} needs a CUDA card; there: {words}")
    if outside and shutil.which(tool) is None:
        raise UserError(f"{tool} is not on PATH: install {SOURCES[tool]}, then: {words}")
    if tool == "proton" and op != "step" and not importlib.util.find_spec("triton.profiler"):
        raise UserError("this Triton has no proton: use --tool nsys")


def run(words: Sequence[str]) -> int:
    """Run a tool; its exit status."""
    # By its path: on Windows ncu is a batch file, which is not found by its bare name.
    return subprocess.run([shutil.which(words[0]) or words[0], *words[1:]]).returncode


def calls(op: str, choice: Choice) -> Iterator[tuple[str, Any]]:
    """(what, call) of the chosen providers of an op at its first chosen shape, or of the step."""
    names = choice.providers or (OWN,)
    steps: dict[str, Any] = dict.fromkeys(STEP_PROVIDERS)
    known = steps if op == "step" else providers(OPS[op])
    if strange := [name for name in names if name not in known]:
        raise UserError(f"{op} has no provider {strange[0]} here: use one of {', '.join(known)}")
    if op == "step":
        from anima_fast.bench.step_models import CONFIG, Bench, Inputs

        bench = Bench(CONFIG)
        bench.inputs = Inputs.random(CONFIG, *step_size(choice))
        for name in names:
            bench.switch("own none" if name == OWN else name)
            yield f"step {name}", bench
        return
    label, sizes = next(iter(chosen_cases(OPS[op], choice)))
    dtype = timed_dtypes(OPS[op], choice)[0]
    inputs = trained(OPS[op], OPS[op].make_inputs(sizes, dtype, DEVICE))
    for name in names:
        call = Call(OPS[op], known[name], inputs)
        yield f"{op} {name} {case_text(label, sizes)}", call.both if call.wanted else call.fwd


def step_size(choice: Choice) -> tuple[int, int]:
    """Tokens and batch of the step."""
    return choice.sizes.get("L", 4096), choice.sizes.get("B", 1)


def under_proton(op: str, choice: Choice) -> Iterator[str]:
    """The tree of kernels with their times, by proton: lines."""
    import triton.profiler as proton

    for what, call in calls(op, choice):
        for _ in range(WARM):
            call()
        synchronize()
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder) / "profile"
            session = proton.start(str(base), context="shadow")
            with proton.scope(what):
                once(call)
            proton.finalize(session)
            roots = json.loads(base.with_suffix(".hatchet").read_text(encoding="utf-8"))
        # The last entry tells about the device.
        trees = [root for root in roots if "frame" in root]
        if not any(map(nanoseconds, trees)):
            yield f"{what}: proton saw no kernel: it may not look into the card here"
        for root in trees:
            yield from tree_lines(root)


def tree_lines(node: dict[str, Any], depth: int = 0) -> Iterator[str]:
    """A line for each node of proton's tree, with the microseconds in it, longest first."""
    children = sorted(node.get("children", ()), key=nanoseconds, reverse=True)
    count = node.get("metrics", {}).get("count", "")
    yield f"{nanoseconds(node) / 1e3:10.1f} us {count:>4}  {'  ' * depth}{node['frame']['name']}"
    for child in children:
        yield from tree_lines(child, depth + 1)


def nanoseconds(node: dict[str, Any]) -> float:
    """Of a node of proton's tree and all below it."""
    own = float(node.get("metrics", {}).get("time (ns)", 0))
    return own + sum(map(nanoseconds, node.get("children", ())))


def step_text(choice: Choice) -> str:
    """Phases of the step: time in kernels, launches, gaps between them; the wait for data."""
    from anima_fast.bench.loading import waits
    from anima_fast.bench.step import PHASES, profiled_phases

    lines = []
    for what, bench in calls("step", choice):
        for _ in range(WARM):
            bench()
        synchronize()
        start = time.perf_counter()
        bench()
        synchronize()
        whole = time.perf_counter() - start
        found = profiled_phases(bench)
        busy = sum(phase.busy_s for phase in found.values())
        for name in PHASES:
            phase = found[name]
            lines.append((what, name, f"{1e3 * phase.busy_s:.2f}", str(phase.launches),
                          f"{1e3 * phase.longest_gap_s:.2f}", phase.longest_kernel))  # fmt: skip
        waiting = f"{1e3 * whole:.2f} ms, {max(0.0, 1 - busy / whole):.0%} of it waiting"
        lines.append(
            (what, "whole", f"{1e3 * busy:.2f}", "", f"{1e3 * (whole - busy):.2f}", waiting)
        )
        data = waits(bench, *step_size(choice))
        waiting = f"{data.share:.1%} of {len(data.whole)} steps is waiting for the next batch"
        lines.append((what, "data", "", "", f"{1e3 * data.seconds:.2f}", waiting))
    header = ("step", "phase", "kernels ms", "launches", "gap ms", "longest kernel")
    return table(header, lines, left=2)


def once(call: Callable[[], object]) -> None:
    """Run a call to its end; scopes and ranges are of one thread, so its backward stays in it."""
    with torch.autograd.set_multithreading_enabled(False):
        call()
    synchronize()


def main(words: Sequence[str] | None = None) -> None:
    """Run what is profiled once, in a range, after a warm-up outside of it."""
    parser = argparse.ArgumentParser(prog="python -m anima_fast.bench.profile")
    parser.add_argument("op")
    for name in ("case", "dtype", "provider"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args(words)
    choice = parse_choice([given.op], cases=[given.case], dtypes=[given.dtype],
                          providers=[given.provider])  # fmt: skip
    for what, call in calls(given.op, choice):
        for _ in range(WARM):
            call()
        synchronize()
        torch.cuda.profiler.start()
        with torch.cuda.nvtx.range(what):
            once(call)
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
