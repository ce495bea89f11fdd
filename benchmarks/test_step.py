"""The training step of the 2B model with random weights: who is how fast, and needs how much.

    python -m pytest benchmarks/test_step.py --tokens 4096 --batch 1

A step is forward, flow loss, backward, clipping and AdamW of a rank-32 LoRA. First each provider is
warmed up alone: its peak memory, its phases, its launches from a short profile, each written as
soon as it is known. Then all take turns for the step time, gaps between launches included.

Providers: eager; compiled (torch.compile of every block); ours at each policy, once with our
attention kernel, once launched as CUDA graphs: one model, switched. diffusers with peft, where
installed, comes after them with a model of its own, as its training scripts run it (autocast). A
provider that runs out of memory is noted and left out. Without a card a tiny model runs on the CPU,
to run this code.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from step_models import CONFIG, DTYPE, POLICIES, RANK, TEXT_ROWS, Bench, Diffusers, Inputs, Phases

from anima_fast.measure.step_time import step_flops
from anima_fast.measure.timer import Ceilings, Timer, on_card, reason, synchronize
from benchmarks.rows import Row, spread

TOKENS, BATCHES = ((1024, 4096), (1, 4)) if on_card() else ((16,), (1,))
OURS = tuple(f"ours {policy}" for policy in POLICIES)
GRAPHS = ("ours none graphs",) if on_card() else ()
MODELS = {
    # Graphs last: their memory stays.
    "anima": ("eager", "compiled", *OURS, "ours none triton-attention", *GRAPHS),
    "diffusers": ("diffusers",),
}
PHASES = ("forward", "backward", "optimize")
WARM_STEPS, MOST_ROUNDS, LEAST_ROUNDS = 3, 20, 3
# Of the time that is left after warming up, for the rounds.
ROUNDS_SHARE = 0.6
GIB = 2**30
# Relative, far above bfloat16's rounding and far below what a wrong block gives.
LOSS_TOLERANCE = 0.02


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, default in (("tokens", TOKENS), ("batch", BATCHES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, metafunc.config.getoption(f"--{name}") or default)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[str]:
    """One model at a time, so that none sits in the other's peak memory."""
    yield request.param
    _made.clear()
    gc.collect()
    if on_card():
        torch.cuda.empty_cache()


_made: dict[str, Phases] = {}


def runner_of(model: str) -> Phases:
    """Who runs the steps of a model; made when first needed, shared by all sizes."""
    if model not in _made:
        _made[model] = Diffusers(CONFIG) if model == "diffusers" else Bench(CONFIG)
    return _made[model]


@dataclass
class Profile:
    """Seconds, seconds in kernels, and launches of one phase; the last two on a card only."""

    seconds: float
    busy: float | None = None
    launches: int | None = None


def timed_phases(step: Phases) -> dict[str, Profile]:
    """Wall time of each phase of one step, the card waited for in between."""
    found = {}
    for phase in PHASES:
        synchronize()
        start = time.perf_counter()
        getattr(step, phase)()
        synchronize()
        found[phase] = Profile(time.perf_counter() - start)
    return found


def profiled(step: Phases, found: dict[str, Profile]) -> None:
    """Add kernel time and launches, from one more step under torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for phase in PHASES:
        synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            getattr(step, phase)()
            synchronize()
        # Annotations of optimizers lie on the card's line too; they are no launches.
        events = [
            e
            for e in trace.events()
            if e.device_type == DeviceType.CUDA
            and not getattr(e, "is_user_annotation", False)
            and not e.name.startswith(("Optimizer.", "ProfilerStep"))
        ]
        # None at all: the profiler may not look into the card here. That is unknown, not zero.
        if events:
            found[phase].busy = sum(e.time_range.elapsed_us() for e in events) / 1e6
            found[phase].launches = len(events)


def warm(step: Phases, row: Row, record: Callable[[Row], Row]) -> float:
    """Warm a provider up; record its peak, its phases and its launches. Returns its first loss."""
    step.forward()
    loss = step.loss.item()
    step.backward()
    step.optimize()
    for _ in range(WARM_STEPS - 1):
        step()
    synchronize()
    graphs = step.dit.graphs if isinstance(step, Bench) else None
    if graphs is not None and not graphs.replayed:
        raise RuntimeError(graphs.off or "no step ran as a graph")
    if on_card():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        # A replay allocates nothing: what its pool holds counts as reserved only.
        stat = torch.cuda.memory_reserved if graphs else torch.cuda.max_memory_allocated
        record(replace(row, mode="peak", p50=stat() / GIB, unit="GiB"))
    phases = timed_phases(step)
    if on_card():
        # Without a profile the rest is as true as with it.
        with contextlib.suppress(RuntimeError):
            profiled(step, phases)
    for phase, found in phases.items():
        record(replace(row, mode=phase, p50=found.seconds * 1e3, unit="ms"))
        if found.launches is not None:
            record(replace(row, mode=f"{phase} busy", p50=found.busy * 1e3, unit="ms"))
            record(replace(row, mode=f"{phase} launches", p50=found.launches, unit="launches"))
    return loss


def test_step(
    model: str,
    tokens: int,
    batch: int,
    benchmark: Any,
    record: Callable[[Row], Row],
    limits: Ceilings,
    seconds_left: Callable[[], float],
) -> None:
    shape = f"B={batch} L={tokens} S={TEXT_ROWS} R={RANK}"
    plain = Row("step", "", "step", shape, str(DTYPE).removeprefix("torch."), unit="s",
                tokens=tokens, batch=batch)  # fmt: skip
    steps: dict[str, Callable] = {}
    before: dict[str, Callable] = {}
    problems: dict[str, str] = {}
    losses: dict[str, float] = {}
    inputs = Inputs.random(CONFIG, tokens, batch)
    if model == "diffusers" and (missing := missing_packages()):
        record(replace(plain, provider=model, note=missing))
        pytest.skip(missing)
    for provider in MODELS[model]:
        row = replace(plain, provider=provider)
        if seconds_left() < 0:
            problems[provider] = "the time of this slice was over"
        else:
            try:
                step = runner_of(model)
                step.inputs = inputs
                if isinstance(step, Bench):
                    before[provider] = lambda step=step, provider=provider: step.switch(provider)
                    before[provider]()
                losses[provider] = warm(step, row, record)
                steps[provider] = step
                if problem := disagreement(losses, provider):
                    problems[provider] = problem
                    del steps[provider]
            except Exception as error:
                problems[provider] = reason(error)
        if provider in problems:
            record(replace(row, note=problems[provider]))
            give_memory_back()

    timer = Timer(steps, before=before, batch=1, flush=False)
    per_round = timer.warm(times=1)
    rounds = int(ROUNDS_SHARE * max(0.0, seconds_left()) / per_round) if on_card() else 2
    benchmark.pedantic(timer.round, rounds=max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds)))
    flops = step_flops(CONFIG, tokens, batch, RANK, TEXT_ROWS)
    for provider, samples in timer.seconds.items():
        row = replace(plain, provider=provider, **spread(samples))
        rate = flops / row.p50
        rates = {"tflop_s": rate / 1e12, "share_of_ceiling": rate / limits.peak}
        record(replace(row, **rates, note="share_of_ceiling: of the measured product"))
        record(replace(row, mode="images", p20=None, p50=batch / row.p50, p80=None,
                       unit="images/s"))  # fmt: skip
        if limits.sheet_peak:
            record(replace(row, mode="mfu", p20=None, p50=rate / limits.sheet_peak, p80=None,
                           unit="share", note="of the data sheet's bfloat16 peak"))  # fmt: skip
        benchmark.extra_info[provider] = row.p50
    for provider, why in timer.failed.items():
        record(replace(plain, provider=provider, note=why))
        problems[provider] = why
    # Any may be too large for a card, and others may break; ours must not.
    assert not {k: v for k, v in problems.items() if k in OURS and v != "out of memory"}


def disagreement(losses: dict[str, float], provider: str) -> str:
    """Why a provider must not be timed: its loss is not the eager one's; "" when it is."""
    own, eager = losses[provider], losses.get("eager", losses[provider])
    # The same weights but for some steps at a tiny rate. NaN fails too.
    if abs(own - eager) <= LOSS_TOLERANCE * abs(eager):
        return ""
    return f"its loss is {own:.4g}, eager's {eager:.4g}"


def missing_packages() -> str:
    """What diffusers' provider lacks here, or ""."""
    lacking = [name for name in ("diffusers", "peft") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def give_memory_back() -> None:
    """After a failure: drop what half a step has left."""
    for step in _made.values():
        step.__dict__.pop("loss", None)
    gc.collect()
    if on_card():
        torch.cuda.empty_cache()
