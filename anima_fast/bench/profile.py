"""One op, or the training step, under a profiler.

    python -m anima_fast.bench.profile OP CHOICE

runs an op (forward and backward, or `step`) once inside a range of its name, for a tool that starts
programs: ncu, nsys. proton comes with Triton and runs in this process; torch's own profiler answers
for the step: phases, gaps in which the card waits for the host. How long the step waits for its
data is timed without a profiler, with the trainer's own loader (loading.py).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from anima_fast.bench.choice import Choice
from anima_fast.bench.providers import COMPILE, EAGER, OWN, providers
from anima_fast.bench.tables import table
from anima_fast.bench.times import DEVICE, Call, case_text, cases, dtypes_of, trained
from anima_fast.errors import UserError
from anima_fast.kernels.registry import OPS
from anima_fast.measure.timer import synchronize

TOOLS = ("proton", "ncu", "nsys", "sass")
COMMANDS = {
    "ncu": "ncu --set full --nvtx --nvtx-include anima_fast/ --target-processes all {run}",
    "nsys": "nsys profile --trace cuda,nvtx --stats true --force-overwrite true -o {name} {run}",
}
SOURCES = {"ncu": "Nsight Compute", "nsys": "Nsight Systems"}
# Of the whole step, where op by op `providers` are meant.
STEP_PROVIDERS = (OWN, EAGER, COMPILE)
WARM = 3


def command(tool: str, op: str, choice: Choice) -> str:
    """The command line that profiles an op under ncu or nsys."""
    run = f"{sys.executable} -m anima_fast.bench.profile {op} '{choice.dumps()}'"
    return COMMANDS[tool].format(run=run, name=f"{op}-profile")


def check(tool: str, op: str, choice: Choice) -> None:
    """Raise `UserError`, with what to type where it works, when a tool cannot run here."""
    words = command(tool, op, choice) if tool in COMMANDS else f"anima-fast bench profile {op}"
    if not torch.cuda.is_available():
        raise UserError(f"--tool {tool} needs a CUDA card; there: {words}")
    if tool in COMMANDS and shutil.which(tool) is None:
        raise UserError(f"{tool} is not on PATH: install {SOURCES[tool]}, then: {words}")


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
    label, sizes = next(iter(cases(OPS[op], choice)))
    dtype = dtypes_of(OPS[op], choice)[0]
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
            session = proton.start(str(base), context="shadow", hook="triton")
            with proton.scope(what):
                call()
            synchronize()
            proton.finalize(session)
            roots = json.loads(base.with_suffix(".hatchet").read_text(encoding="utf-8"))
        for root in roots:
            if "frame" in root:
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


def main(op: str, text: str) -> None:
    """Run what is profiled once, in a range, after a warm-up outside of it."""
    for what, call in calls(op, Choice.loads(text)):
        for _ in range(WARM):
            call()
        synchronize()
        torch.cuda.nvtx.range_push(f"anima_fast {what}")
        call()
        synchronize()
        torch.cuda.nvtx.range_pop()


if __name__ == "__main__":
    main(*sys.argv[1:])
