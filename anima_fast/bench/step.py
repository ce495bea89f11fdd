"""The training step of the 2B model with random weights, on a card: time, peak, phases, launches.

A step is forward, flow loss, backward, clipping and AdamW of a LoRA. Each provider warms up alone,
then its loss and its gradients must be eager's, then its peak memory, phases and launches are
taken; last all take turns for the step time, gaps between launches included. A provider that fails
or runs out of memory is noted and left out. diffusers with peft, where installed, has a model of
its own and comes after the others.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from anima_fast.bench.choice import DIFFUSERS, Choice, name_of
from anima_fast.bench.run_file import Measurement, sampled
from anima_fast.bench.step_models import (
    CONFIG,
    DTYPE,
    POLICIES,
    RANK,
    TEXT_ROWS,
    Bench,
    Diffusers,
    Inputs,
    Phases,
)
from anima_fast.measure.card_state import CardState
from anima_fast.measure.cards import float16_sums
from anima_fast.measure.rates import Rates
from anima_fast.measure.step_time import BLOCK, SHORT_BLOCK, op_times, step_flops, step_time
from anima_fast.measure.timer import Ceilings, Timer, ceilings, on_card, reason, synchronize
from anima_fast.models.dit_config import PUBLISHED

SIZES = ((4096, 1), (4096, 4), (1024, 1), (1024, 4))
OWN = (*(f"own {policy}" for policy in POLICIES), "own none triton-attention")
# Graphs last: their memory stays as long as the size.
HALF = tuple(f"own {policy} fp16-short" for policy in POLICIES)
MODELS = {"anima": ("eager", "compile", *OWN, *HALF, "own none graphs"), DIFFUSERS: (DIFFUSERS,)}
PHASES = ("forward", "backward", "optimize")
WARM_STEPS, MOST_ROUNDS, LEAST_ROUNDS = 3, 20, 3
# Relative to eager's: far above bfloat16's rounding over 28 blocks and far below what a wrong
# block gives.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.02, 0.15


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Rows of the step at each size, as each provider is done."""
    limits = ceilings()
    sizes: Sequence[tuple[int, int]] = SIZES
    if "L" in choice.sizes or "B" in choice.sizes or choice.quick:
        sizes = ((choice.sizes.get("L", 4096), choice.sizes.get("B", 1)),)
    for model, names in MODELS.items():
        chosen = chosen_of(names, choice)
        if not chosen:
            continue
        missing = model == "diffusers" and missing_packages()
        if missing:
            yield [Measurement("step", "time", None, "s", provider=model, note=missing)]
            continue
        step = Diffusers(CONFIG) if model == "diffusers" else Bench(CONFIG)
        for tokens, batch in sizes:
            step.forget()
            give_memory_back()
            step.inputs = Inputs.random(CONFIG, tokens, batch)
            yield from _size_rows(step, chosen, tokens, batch, limits, choice.seconds)
        del step
        give_memory_back()


def chosen_of(names: Sequence[str], choice: Choice) -> list[str]:
    """The providers of a model that a choice asks for, and eager, with which they must agree."""
    chosen = [n for n in names if not choice.providers or n.split()[0] in choice.providers]
    if choice.quick:
        chosen = [n for n in chosen if n in ("eager", "own none")]
    eager = [n for n in names if n == "eager" and chosen and n not in chosen]
    return eager + chosen


def _size_rows(
    step: Phases, names: list[str], tokens: int, batch: int, limits: Ceilings, seconds: float
) -> Iterator[list[Measurement]]:
    case = f"B={batch} L={tokens} S={TEXT_ROWS} R={RANK}"
    source = "card" if on_card() else "host"
    plain = Measurement("step", "time", None, "s", case, name_of(DTYPE),
                        mode="both", source=source)  # fmt: skip
    reference: tuple[float, Tensor] | None = None
    before: dict[str, Callable] = {}
    for name in names:
        row = replace(plain, provider=name)
        try:
            before[name] = _switcher(step, name)
            before[name]()
            first = first_step(step)
            why = disagreement(first, reference)
            if name == "eager":
                reference = first
            if why:
                raise RuntimeError(why)
            yield list(_alone(step, row))
        except Exception as error:
            before.pop(name, None)
            step.__dict__.pop("loss", None)
            give_memory_back()
            yield [replace(row, note=reason(error))]
    state = CardState()
    timer = Timer({name: step for name in before}, before=before, batch=1, flush=False,
                  watch=state.watch)  # fmt: skip
    per_round = timer.warm(times=1)
    rounds = int(seconds * max(len(before), 1) / per_round) if before else 0
    for _ in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds))):
        timer.round()
    flops = step_flops(CONFIG, tokens, batch, RANK, TEXT_ROWS)
    doubled = float16_sums(torch.cuda.get_device_name()) if on_card() else 1.0
    found = [replace(plain, provider=name, note=why) for name, why in timer.failed.items()]
    for name, samples in timer.seconds.items():
        row = sampled(replace(plain, provider=name), samples)
        assert row.value is not None
        rate = flops / row.value
        parts = {"images_per_s": batch / row.value, "tflop_s": rate / 1e12,
                 "share_of_ceiling": rate / limits.peak}  # fmt: skip
        if limits.sheet_peak:
            parts["mfu"] = rate / limits.sheet_peak
        if (name in OWN[: len(POLICIES)] or name in HALF) and CONFIG is PUBLISHED:
            times = op_times(Rates(limits.bandwidth, limits.peak), tokens=tokens, batch=batch,
                             rank=RANK, float16_sums=doubled)  # fmt: skip
            block = SHORT_BLOCK if name in HALF else BLOCK
            parts["predicted_s"] = step_time(times, name.split()[1], block=block).seconds
        alone = isinstance(step, Bench) and reference is None
        notes = state.note(name), "not compared: eager's step failed" if alone else ""
        parts |= state.seen(name)
        found.append(replace(row, parts=parts, note="; ".join(filter(None, notes))))
    yield found


def _switcher(step: Phases, name: str) -> Callable[[], None]:
    if isinstance(step, Bench):
        return lambda: step.switch(name)
    return lambda: None


def first_step(step: Phases) -> tuple[float, Tensor]:
    """Warm up; loss and gradients (on the CPU) of the step after, whose update follows."""
    for _ in range(WARM_STEPS - 1):
        step()
    step.forward()
    loss = step.loss.item()
    step.backward()
    # Off the card: a copy there would count in the peak.
    gradient = step.gradient().to("cpu", copy=True)
    step.optimize()
    graphs = step.dit.graphs if isinstance(step, Bench) else None
    if graphs is not None and not graphs.replayed:
        raise RuntimeError(graphs.off or "no step ran as a graph")
    return loss, gradient


def disagreement(found: tuple[float, Tensor], reference: tuple[float, Tensor] | None) -> str:
    """Why a provider must not be timed: its loss or its gradients are not eager's; else ""."""
    if reference is None:
        return ""
    (loss, gradient), (eager_loss, eager_gradient) = found, reference
    # Written so that NaN fails too.
    if not abs(loss - eager_loss) <= LOSS_TOLERANCE * abs(eager_loss):
        return f"not timed: its loss is {loss:.4g}, eager's {eager_loss:.4g}"
    error = ((gradient - eager_gradient).norm() / eager_gradient.norm()).item()
    if not error <= GRADIENT_TOLERANCE:
        return f"not timed: its gradients differ from eager's by {error:.0%}"
    return ""


def _alone(step: Phases, row: Measurement) -> Iterator[Measurement]:
    """Peak memory, phases and launches of a provider that runs by itself."""
    if on_card():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        synchronize()
        # What the card must have: a replayed graph allocates nothing, its pool is reserved.
        peak = torch.cuda.max_memory_reserved()
        yield replace(row, metric="peak", value=peak, unit="bytes", note="reserved")
    for phase in PHASES:
        synchronize()
        start = time.perf_counter()
        getattr(step, phase)()
        synchronize()
        yield replace(row, mode=phase, value=time.perf_counter() - start)
    if on_card():
        # Without a profile the rest is as true as with it.
        with contextlib.suppress(RuntimeError):
            yield from _profiled(step, row)


def _profiled(step: Phases, row: Measurement) -> Iterator[Measurement]:
    for name, phase in profiled_phases(step).items():
        # None at all: the profiler may not look into the card here. That is unknown, not zero.
        if phase.launches:
            parts = {"busy_s": phase.busy_s, "longest_gap_s": phase.longest_gap_s}
            yield replace(row, metric="launches", mode=name, value=float(phase.launches),
                          unit="launches", parts=parts)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A phase of the step on the card: seconds in kernels, launches, the longest gap between two
    kernels, and the kernel that took longest in all."""

    busy_s: float
    launches: int
    longest_gap_s: float
    longest_kernel: str


def profiled_phases(step: Phases) -> dict[str, Phase]:
    """Phase → what torch's profiler sees of it on the card, in one step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    found = {}
    for name in PHASES:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            getattr(step, name)()
            synchronize()
        # Annotations of optimizers lie on the card's line too; they are no launches.
        events = [
            e
            for e in trace.events()
            if e.device_type == DeviceType.CUDA
            and not getattr(e, "is_user_annotation", False)
            and not e.name.startswith(("Optimizer.", "ProfilerStep"))
        ]
        spans = sorted((e.time_range.start, e.time_range.end) for e in events)
        gaps = [max(0.0, after[0] - before[1]) for before, after in pairwise(spans)]
        by_kernel: Counter[str] = Counter()
        for event in events:
            by_kernel[event.name] += event.time_range.elapsed_us()
        found[name] = Phase(
            busy_s=sum(by_kernel.values()) / 1e6,
            launches=len(events),
            longest_gap_s=max(gaps, default=0.0) / 1e6,
            longest_kernel=max(by_kernel, key=lambda kernel: by_kernel[kernel], default=""),
        )
    return found


def missing_packages() -> str:
    """What diffusers' provider lacks here, or ""."""
    lacking = [name for name in ("diffusers", "peft") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def give_memory_back() -> None:
    """After a failure, or between two models."""
    gc.collect()
    if on_card():
        torch.cuda.empty_cache()
