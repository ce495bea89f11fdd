"""pytest-benchmark's view of the ops: an entry for each op, case, provider and mode.

    python -m pytest benchmarks/test_ops.py -k "attention and fwd" --benchmark-compare

The calls, and the rule that only what is right is timed, are those of `anima-fast bench run`, which
times with held queues, cold caches and providers in turn. This is for pytest-benchmark's own
tables, storage, comparison and histograms, by wall clock. Without a card every entry runs once at
the smallest size, to run the code, and nothing is timed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anima_fast.bench.cases import case_text, chosen_cases, timed_dtypes
from anima_fast.bench.choice import Choice
from anima_fast.bench.providers import libraries_of, providers
from anima_fast.bench.times import DEVICE, MODES, Call, problem, trained
from anima_fast.kernels.registry import OPS
from anima_fast.measure.timer import on_card, synchronize


def entries() -> list[Any]:
    """(op, case, sizes, provider, mode) of everything that can be timed."""
    found = []
    for name, op in OPS.items():
        chosen = chosen_cases(op, Choice(quick=True))
        real = [(case_text(label, sizes), sizes) for label, sizes in chosen]
        small = [(case_text("", op.shapes[-1]), op.shapes[-1])]
        for case, sizes in real if on_card() else small:
            for provider in ("own", "eager", "compile", *libraries_of(op)):
                for mode in MODES if op.grads else MODES[:1]:
                    entry = f"{name}-{case}-{provider}-{mode}".replace(" ", ",")
                    found.append(pytest.param(name, case, sizes, provider, mode, id=entry))
    return found


@pytest.mark.parametrize(("name", "case", "sizes", "provider", "mode"), entries())
def test_op(
    name: str, case: str, sizes: dict[str, int], provider: str, mode: str, benchmark: Any
) -> None:
    op = OPS[name]
    function = providers(op).get(provider)
    if function is None:
        pytest.skip(f"{provider} is not installed")
    dtype = timed_dtypes(op, Choice())[0]
    if not on_card():
        if provider == "compile":
            pytest.skip("compiling takes a while and says nothing on a CPU")
        dtype = torch.float32 if torch.float32 in op.dtypes else dtype
    why, _ = problem(op, function, sizes, dtype)
    if why:
        assert provider != "own", why
        pytest.skip(why)
    call = getattr(Call(op, function, trained(op, op.make_inputs(sizes, dtype, DEVICE))), mode)
    benchmark.group = f"{name} {case} {mode}"

    def wait() -> None:
        call()
        synchronize()

    benchmark.pedantic(wait, rounds=20 if on_card() else 1, warmup_rounds=3 if on_card() else 0)
