"""Every op of the registry: eager, compiled and ours, forward and forward with backward.

    python -m pytest benchmarks/test_ops.py --tokens 4096 -k attention

An op is timed only when it equals its definition on this machine; otherwise its benchmark is
skipped with the reason and `test_parity` fails. pytest-benchmark drives the rounds: one round times
every provider once, and its own clock shows a whole round. The times per provider are in the rows
(`--rows`) and in pytest-benchmark's extra_info.

Providers: eager is `Op.reference`; compiled is torch.compile of it; ours is `Op.function`, which on
the CPU is the reference again; library, where there is one, is what the eager model calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anima_fast.bench.parity import check_op, leaves
from anima_fast.kernels.op import Inputs, Op, Sizes
from anima_fast.kernels.registry import OPS
from anima_fast.measure.step_time import PARAMETER_OPS
from anima_fast.measure.timer import Call, Ceilings, Timer, on_card, reason
from benchmarks.rows import Row, spread, throughput

DEVICE = "cuda" if on_card() else "cpu"
TOKENS = (1024, 2304, 4096, 9216) if on_card() else (16,)
# On the CPU widths shrink too: to nothing that stands for a model.
CPU_SIZES = {"D": 64, "K": 16, "H": 2, "N": 64, "M": 16, "S": 16, "L": 16, "R": 4}
MODES = ("forward", "forward+backward")
MOST_ROUNDS, BUDGET_S = 20, 4.0


def dtype_of(op: Op) -> torch.dtype:
    """bfloat16 on a card (adapter states float32), float32 on the CPU."""
    wanted = torch.bfloat16 if on_card() and op.name not in PARAMETER_OPS else torch.float32
    return wanted if wanted in op.dtypes else op.dtypes[0]


def sizes_here(op: Op, sizes: Sizes) -> dict[str, int]:
    """The sizes, on the CPU cut down."""
    if on_card():
        return dict(sizes)
    if op.name in PARAMETER_OPS:
        return {**sizes, "N": 1000}
    # N counts normed parts where P counts packed ones; it is small already.
    return {k: min(v, CPU_SIZES.get(k, v)) for k, v in sizes.items()}


@functools.cache
def parity_problem(name: str) -> str:
    """Why an op must not be timed: its first failed check on this machine, or ""."""
    op = OPS[name]
    try:
        checks = check_op(op, op.shapes[-1], dtype_of(op), device=DEVICE)
    except Exception as error:
        return reason(error)
    failed = [c for c in checks if not c.passed]
    return "".join(
        f"{c.tensor} at {c.shape}: error {c.error:.1e}, allowed {c.allowed:.1e} {c.remark}"
        for c in failed[:1]
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        tokens = metafunc.config.getoption("--tokens") or TOKENS
        cases = [
            pytest.param((name, label, count), id=f"{name}-{label or 'one'}-{count}")
            for count in tokens
            for name, op in OPS.items()
            for label in op.real_shapes(count)
            # What does not depend on image tokens is timed at the first size only.
            if count == TOKENS[0]
            or op.real_shapes(count)[label] != op.real_shapes(TOKENS[0])[label]
        ]
        metafunc.parametrize("case", cases)


@pytest.mark.parametrize("name", OPS)
def test_parity(name: str) -> None:
    assert not parity_problem(name)


def providers(op: Op, inputs: Inputs) -> Iterator[tuple[str, Callable]]:
    """Name and function of everyone who computes this op."""
    torch._dynamo.reset()
    yield "eager", op.reference
    yield "compiled", torch.compile(op.reference, dynamic=False)
    yield "ours", op.function
    if op.name == "attention":
        yield "library", library_attention(inputs)


def library_attention(inputs: Inputs) -> Callable[..., Tensor]:
    """PyTorch's attention, as the eager model calls it; counts of zero keys prepared before."""
    from anima_fast.models.attention import attention, prepare_zero_rows

    q, counts = inputs["q"], inputs["zero_keys"]
    rows = None
    if counts is not None:
        rows = prepare_zero_rows(counts.tolist(), len(q), q.dtype, q.device)
    return lambda q, k, v, zero_keys: attention(q, k, v, zero_keys=rows)


def calls(op: Op, inputs: Inputs, function: Callable) -> dict[str, Call]:
    """Mode → a call without arguments; upstream gradients are made once."""
    wanted = list(leaves(inputs, op.grads).values())
    found: dict[str, Call] = {"forward": lambda: function(**inputs)}
    if wanted:
        upstream: list[Tensor] = []

        def both() -> Any:
            out = function(**inputs)
            outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
            if not upstream:
                upstream.extend(torch.ones_like(o) for o in outs)
            return torch.autograd.grad(outs, wanted, upstream)

        found["forward+backward"] = both
    return found


def test_op(
    case: tuple[str, str, int],
    benchmark: Any,
    record: Callable[[Row], Row],
    limits: Ceilings,
    seconds_left: Callable[[], float],
) -> None:
    name, label, tokens = case
    op = OPS[name]
    if problem := parity_problem(name):
        pytest.skip(f"not timed, as it is not right: {problem}")
    if seconds_left() < 0:
        pytest.skip("the time of this slice is over")
    sizes, dtype = sizes_here(op, op.real_shapes(tokens)[label]), dtype_of(op)
    torch.manual_seed(0)
    inputs = op.make_inputs(sizes, dtype, DEVICE)
    for leaf in leaves(inputs, op.grads).values():
        leaf.requires_grad_()
    timer = Timer(
        {
            f"{provider} {mode}": call
            for provider, function in providers(op, inputs)
            for mode, call in calls(op, inputs, function).items()
        }
    )
    per_round = timer.warm()
    budget = min(BUDGET_S, max(0.0, seconds_left()))
    rounds = max(2, min(MOST_ROUNDS, int(budget / per_round))) if on_card() else 2
    benchmark.pedantic(timer.round, rounds=rounds)

    size_text = " ".join(f"{k}={v}" for k, v in sizes.items())
    shape = f"{label}: {size_text}" if label else size_text
    cost = op.cost(sizes, dtype.itemsize)
    for provider_mode in (*timer.seconds, *timer.failed):
        provider, mode = provider_mode.split()
        row = Row(name, provider, mode, shape, str(dtype).removeprefix("torch."), unit="ms",
                  tokens=tokens, batch=sizes.get("B"))  # fmt: skip
        row = row.__dict__ | {"note": timer.failed.get(provider_mode, "")}
        if samples := timer.seconds.get(provider_mode):
            both = mode == MODES[1]
            bytes_moved = cost.forward_bytes + both * cost.backward_bytes
            flops = cost.forward_flops + both * cost.backward_flops
            row |= spread(samples, 1e3)
            row |= throughput(row["p50"] / 1e3, bytes_moved, flops,
                              bandwidth=limits.bandwidth, peak=limits.peak)  # fmt: skip
        row = record(Row(**row))
        benchmark.extra_info[provider_mode] = {"p50_ms": row.p50, "note": row.note}
    missing = {k: v for k, v in timer.failed.items() if k.startswith("ours")}
    assert not missing
