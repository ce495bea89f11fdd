"""What a training step costs the host before a card does anything: Python, dispatch, autograd.

    python benchmarks/host_time.py --out host_time.json

28 blocks as in the 2B model, but so narrow that arithmetic takes next to no time; Triton's launches
are counted and left out, CUDA's own launch time (a few microseconds each) is not in it. So it is a
lower bound of the step on a card that is infinitely fast, which small images on a fast card come
near to. Providers: eager; ours; ours as CUDA graphs, whose replay is replaced by nothing. Medians
of CPU time, of ratios within a round. Runs without a card.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import step_models

from anima_fast.kernels import dispatch, lora_linear
from anima_fast.models import block_graphs

CONFIG = replace(
    step_models.TINY, num_blocks=28, model_channels=32, num_heads=1, mlp_hidden=32
)  # fmt: skip
TOKENS = 4
PROVIDERS = ("eager", "ours none", "ours none graphs")
# Operators that return without a kernel, beside views.
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "lift_fresh", "promote_types", "_reshape_alias")

launched: Counter[str] = Counter()


class Operators(TorchDispatchMode):
    """Counts the operators that would launch something on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if not func.is_view and not name.startswith(NO_KERNEL):
            launched["operators"] += 1
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


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each provider")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    JITFunction.run = count_launch
    # As on a card: kernels of our own by Triton, products by the library.
    dispatch.runs_triton = lambda x: bench.ours
    lora_linear.uses_triton = lambda x, implementation="auto": False
    step_models.TEXT_ROWS, step_models.PADDED_ROWS = 2, 5
    step_models.DTYPE = torch.bfloat16
    bench = step_models.Bench(CONFIG, dtype=step_models.DTYPE)
    bench.inputs = step_models.Inputs.random(CONFIG, TOKENS, 1)
    bench.graphs.capture = no_graph
    # What replaces the replays computes nothing that could agree.
    block_graphs.disagreement = lambda *_: 0.0

    rows, seconds = [], {provider: [] for provider in PROVIDERS}
    for provider in PROVIDERS:
        bench.switch(provider)
        for _ in range(3):
            bench()
        launched.clear()
        with Operators():
            bench()
        rows.append({"provider": provider, **{k: launched[k] for k in ("operators", "triton")}})
    for _ in range(arguments.rounds):
        for provider in PROVIDERS:
            bench.switch(provider)
            start = time.process_time()
            bench()
            seconds[provider].append(time.process_time() - start)
    print(f"{'':18}{'host ms':>9}{'of eager':>10}{'operators':>11}{'Triton launches':>17}")
    for row in rows:
        own = seconds[row["provider"]]
        row["host_ms"] = 1e3 * statistics.median(own)
        row["of_eager"] = statistics.median(
            a / b for a, b in zip(own, seconds["eager"], strict=True)
        )
        print(
            f"{row['provider']:18}{row['host_ms']:>9.1f}{row['of_eager']:>10.2f}"
            f"{row['operators']:>11}{row['triton']:>17}"
        )
    if arguments.out:
        from anima_fast.files import write_json

        versions = {"python": platform.python_version(), "torch": torch.__version__}
        date = datetime.date.today().isoformat()
        write_json(arguments.out, {"blocks": CONFIG.num_blocks, **versions, "date": date,
                                   "results": rows})  # fmt: skip


if __name__ == "__main__":
    main()
