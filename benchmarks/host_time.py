"""What a training step costs the host before a card does anything: Python, dispatch, autograd.

    python benchmarks/host_time.py --out host_time.jsonl

28 blocks as in the 2B model, but so narrow that arithmetic takes next to no time; Triton's launches
are counted and left out, CUDA's own launch time (a few microseconds each) is not in it. So it is a
lower bound of the step on a card that is infinitely fast, which small images on a fast card come
near to. Providers: eager; own; own as CUDA graphs, whose replay is replaced by nothing. Medians of
CPU time, of ratios within a round. Runs without a card. What a block launches there, by name, is
`anima-fast bench run block --metric launches`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from anima_fast.bench import step_models
from anima_fast.bench.environment import environment
from anima_fast.bench.pretend import replaced
from anima_fast.bench.recorder import has_kernel
from anima_fast.bench.run_file import Measurement, ratio, sampled, write_run
from anima_fast.bench.tables import table
from anima_fast.kernels import dispatch, lora_linear
from anima_fast.models import block_graphs

CONFIG = replace(
    step_models.TINY, num_blocks=28, model_channels=32, num_heads=1, mlp_hidden=32
)  # fmt: skip
TOKENS = 4
PROVIDERS = ("eager", "own none", "own none graphs")
launched: Counter[str] = Counter()


class Operators(TorchDispatchMode):
    """Counts the operators that would launch something on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        launched["operators"] += has_kernel(func)
        return func(*args, **(kwargs or {}))


def count_launch(self: JITFunction, *args: object, **kwargs: object) -> None:
    """In place of a launch of a Triton kernel."""
    launched["triton"] += 1


def no_graph(
    stack: nn.Module, inputs: tuple[Tensor, ...], allow_unused_input: bool, pool: object
) -> Callable[..., Tensor]:
    """What `torch.cuda.make_graphed_callables` returns, without the replays."""
    parameters = tuple(stack.parameters())
    out = torch.zeros_like(inputs[0])
    grads = [torch.zeros_like(p) for p in parameters]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            for own, value in zip(inputs, values, strict=False):
                own.copy_(value)
            launched["graphs"] += 1
            return out.detach()

        @staticmethod
        def backward(ctx, dout):
            launched["graphs"] += 1
            return (*(None for _ in inputs), *(g.detach() for g in grads))

    return lambda *values: Graphed.apply(*values, *parameters)


@contextlib.contextmanager
def narrow_bench() -> Iterator[step_models.Bench]:
    """The step as on a card: kernels of our own by Triton, products by the library."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", count_launch),
            (dispatch, "runs_triton", lambda x: bench.own),
            (lora_linear, "uses_triton", lambda *_: False),
            # What replaces the replays computes nothing that could agree.
            (block_graphs, "disagreement", lambda *_: 0.0),
            (step_models, "TEXT_ROWS", 2),
            (step_models, "PADDED_ROWS", 5),
            (step_models, "DTYPE", torch.bfloat16),
        ):
            stack.enter_context(replaced(owner, name, value))
        bench: step_models.Bench = step_models.Bench(CONFIG, dtype=torch.bfloat16)
        bench.inputs = step_models.Inputs.random(CONFIG, TOKENS, 1)
        bench.graphs.capture = no_graph
        yield bench


def measure(rounds: int) -> list[Measurement]:
    """Launches and CPU time of the step, by provider."""
    case = f"blocks={CONFIG.num_blocks} D={CONFIG.model_channels} L={TOKENS}"
    plain = Measurement("step", "launches", None, "launches", case, "bfloat16", mode="both")
    rows: list[Measurement] = []
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    with narrow_bench() as bench:
        for provider in PROVIDERS:
            bench.switch(provider)
            for _ in range(3):
                bench()
            launched.clear()
            with Operators():
                bench()
            total = launched.total()
            rows.append(replace(plain, provider=provider, value=total, parts=dict(launched)))
        for _ in range(rounds):
            for provider in PROVIDERS:
                bench.switch(provider)
                start = time.process_time()
                bench()
                seconds[provider].append(time.process_time() - start)
    timed = replace(plain, metric="time", unit="s", note="CPU time of the host")
    rows += [sampled(replace(timed, provider=p), found) for p, found in seconds.items()]
    return rows


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each provider")
    parser.add_argument("--out", type=Path, help="write the figures to this run file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    found = {(row.metric, row.provider): row for row in rows}
    lines = []
    for provider in PROVIDERS:
        counted, taken = (found[metric, provider] for metric in ("launches", "time"))
        share = ratio(found["time", "eager"], taken)
        parts = (str(counted.parts.get(kind, 0)) for kind in ("operators", "triton"))
        lines.append((provider, f"{1e3 * taken.known:.1f}", f"{share:.2f}", *parts))
    print(table(("", "host ms", "of eager", "operators", "Triton launches"), lines))
    if arguments.out:
        write_run(arguments.out, environment(), rows)


if __name__ == "__main__":
    main()
