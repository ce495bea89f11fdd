"""Times and memory of ops on a card: provider against provider, once parity is green on that shape.

Providers alternate batch by batch (measure/timer.py); samples are kept. The card is watched
within each batch, and one that was slowed by heat or power says so in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch._functorch.config
from torch import Tensor

from anima_fast.bench.cases import case_text, chosen_cases, only_forward, timed_dtypes
from anima_fast.bench.choice import Choice, name_of
from anima_fast.bench.errors import cases, check_cases
from anima_fast.bench.parity import Check, check_op, leaves
from anima_fast.bench.providers import EAGER, OWN, Provider, load_candidate, providers, work
from anima_fast.bench.run_file import Measurement, sampled
from anima_fast.kernels.op import Inputs, Op, Sizes
from anima_fast.kernels.registry import OPS
from anima_fast.measure.card_state import CardState
from anima_fast.measure.rates import Rates
from anima_fast.measure.timer import Ceilings, Timer, ceilings, on_card, reason, synchronize

MODES = ("fwd", "bwd", "both")
# On the CPU, where tests run this code, nothing that it times says anything.
DEVICE, SOURCE = ("cuda", "card") if on_card() else ("cpu", "host")
MOST_ROUNDS, LEAST_ROUNDS = 20, 3


class Call:
    """One provider on one set of inputs: forward, backward, both, with random upstream gradients.

    Constant ones would draw less power than the values of a training, and clocks rise with it.
    """

    def __init__(self, op: Op, function: Provider, inputs: Inputs) -> None:
        self.function, self.inputs = function, inputs
        self.wanted = list(leaves(inputs, op.grads).values())
        self.upstream: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def fwd(self) -> list[Tensor]:
        """Outputs."""
        out = self.function(**self.inputs)
        return list(out) if isinstance(out, tuple) else [out]

    def both(self) -> tuple[Tensor, ...]:
        """Gradients, of a new forward."""
        return self._gradients(self.fwd(), keep=False)

    def bwd(self) -> tuple[Tensor, ...]:
        """Gradients, of one forward that is kept."""
        if not self._outputs:
            self._outputs = self.fwd()
        return self._gradients(self._outputs, keep=True)

    def _gradients(self, outputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
        outputs = [o for o in outputs if o.requires_grad]
        if not self.upstream:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            self.upstream = [
                torch.randn(o.shape, generator=generator, dtype=o.dtype, device=o.device)
                for o in outputs
            ]
        return torch.autograd.grad(outputs, self.wanted, self.upstream, retain_graph=keep)


def trained(op: Op, inputs: Inputs) -> Inputs:
    """`inputs`, with gradients asked for."""
    for leaf in leaves(inputs, op.grads).values():
        leaf.requires_grad_()
    return inputs


def problem(
    op: Op, call: Provider, sizes: Sizes, dtype: torch.dtype, *, whole: bool = False
) -> tuple[str, float]:
    """Why a provider must not be timed at this shape ("" when it may), and its worst error there.

    The rule is that of the parity table, on the very shape and dtype that would be timed; `whole`
    has the cases of the table first. Where the definition's float64 logits do not fit on the card,
    one head stands for all.
    """
    candidate = replace(op, function=call)
    checks: list[Check] = []
    why = ""
    for tried in (sizes, {**sizes, "H": 1}) if sizes.get("H", 1) > 1 else (sizes,):
        try:
            table = cases(op) if whole else ()
            checks = list(check_cases(candidate, table, DEVICE, [name_of(dtype)]))
            checks += check_op(candidate, tried, dtype, device=DEVICE)
            why = ""
            break
        except torch.cuda.OutOfMemoryError as error:
            why = reason(error)
        except Exception as error:
            return reason(error), math.nan
        # Out here the frames that held the tensors of the failed attempt are gone.
        torch.cuda.empty_cache()
    if why:
        return why, math.nan
    failed = [c for c in checks if not c.passed]
    why = "".join(
        f"not timed, as it is not right at {c.case}: {c.tensor} has error {c.error:.1e}, allowed "
        f"{c.allowed:.1e} {c.remark}".rstrip()
        for c in failed[:1]
    )
    return why, max(c.error for c in checks if c.shape == checks[-1].shape)


def rows(choice: Choice) -> Iterator[list[Measurement]]:
    """Ceilings, then errors, times and memory of each op at each real shape, as they are done."""
    limits = ceilings()
    yield ceiling_rows(limits)
    for op in OPS.values():
        if not choice.wants_op(op.name):
            continue
        op = only_forward(op, choice)
        for label, sizes in chosen_cases(op, choice):
            for dtype in timed_dtypes(op, choice):
                yield list(_case_rows(op, label, sizes, dtype, choice, limits))


def _case_rows(
    op: Op, label: str, sizes: Sizes, dtype: torch.dtype, choice: Choice, limits: Ceilings
) -> Iterator[Measurement]:
    row = Measurement(
        op.name, "error", None, "relative", case_text(label, sizes),
        name_of(dtype), source=SOURCE,
    )  # fmt: skip
    calls: dict[str, Call] = {}
    torch.manual_seed(0)
    inputs = trained(op, op.make_inputs(sizes, dtype, DEVICE))
    torch._dynamo.reset()
    candidate = load_candidate(choice.candidate) if choice.candidate else {}
    # Compiled code that gives buffers away in its backward could not run it again alone.
    with torch._functorch.config.patch(donated_buffer=False):
        for name, function in providers(op, candidate).items():
            # A ratio needs eager and ours, whoever else was asked for.
            if choice.providers and name not in {OWN, EAGER, *choice.providers, *candidate}:
                continue
            why, error = problem(op, function, sizes, dtype, whole=name in candidate)
            yield replace(row, provider=name, value=None if math.isnan(error) else error, note=why)
            if not why:
                calls[name] = Call(op, function, inputs)
        modes = [
            m for m in MODES if (not choice.modes or m in choice.modes) and (op.grads or m == "fwd")
        ]
        if choice.wants("time"):
            yield from _times(op, calls, modes, replace(row, metric="time", unit="s"), sizes,
                              dtype, choice, limits)  # fmt: skip
    # Its memory is that of code that does.
    torch._dynamo.reset()
    for name, call in calls.items():
        if on_card() and op.grads and choice.wants("kept", "peak"):
            yield from _memory(call, replace(row, provider=name, unit="bytes", mode="both"))


def _times(
    op: Op, calls: Mapping[str, Call], modes: Sequence[str], row: Measurement, sizes: Sizes,
    dtype: torch.dtype, choice: Choice, limits: Ceilings,
) -> Iterator[Measurement]:  # fmt: skip
    named = {
        f"{name}|{mode}": getattr(call, mode) for name, call in calls.items() for mode in modes
    }
    state = CardState()
    timer = Timer(named, watch=state.watch)
    per_round = timer.warm()
    for _ in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, int(choice.seconds / per_round)))):
        timer.round()
    counts = work(op, sizes, dtype)
    for key in named:
        name, mode = key.split("|")
        one = replace(row, provider=name, mode=mode)
        if key not in timer.seconds:
            yield replace(one, note=timer.failed.get(key, ""))
            continue
        one = sampled(one, timer.seconds[key])
        moved, flops = counts[mode]
        assert one.value is not None
        parts = {
            "gb_s": moved / one.value / 1e9,
            "tflop_s": flops / one.value / 1e12,
            "share_of_ceiling": max(moved / limits.bandwidth, flops / limits.peak) / one.value,
            "predicted_s": Rates(limits.bandwidth, limits.peak).seconds(moved, flops),
        }
        parts = {k: v for k, v in parts.items() if v} | state.seen(key)
        yield replace(one, parts=parts, note=state.note(key))


def _memory(call: Call, row: Measurement) -> Iterator[Measurement]:
    """What a forward keeps for backward beyond its outputs; the peak of both beyond the inputs."""
    try:
        call.both()
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call.fwd()
        storages = [o.untyped_storage() for o in outputs]
        results = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        kept = torch.cuda.memory_allocated() - before - results
        del outputs, storages
        call.both()
        synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    except Exception as error:
        yield replace(row, metric="peak", note=reason(error))
        return
    yield replace(row, metric="kept", value=kept)
    yield replace(row, metric="peak", value=peak)


def ceiling_rows(limits: Ceilings) -> list[Measurement]:
    """The ceilings of this run as rows: of the warm card, with the cold ones as parts."""
    dtype = "bfloat16" if on_card() else "float32"
    row = Measurement("copy", "ceiling", limits.bandwidth, "bytes/s", provider="library",
                      source=SOURCE)  # fmt: skip
    product = replace(row, op="product", value=limits.peak, unit="operations/s", dtype=dtype)
    found = limits.measured
    if found is None:
        return [row, product]
    clocks = {"clock_mhz": found.clock_mhz, "cold_clock_mhz": found.cold_clock_mhz}
    known = {name: float(clock) for name, clock in clocks.items() if clock is not None}
    warm = {"warm_s": found.warmth.seconds, **known}
    note = "" if found.warmth.steady else "the clock was not steady yet"
    return [
        replace(row, parts={"cold": found.cold.bandwidth, **warm}, note=note),
        replace(product, parts={"cold": found.cold.tensor, **warm}, note=note),
    ]
