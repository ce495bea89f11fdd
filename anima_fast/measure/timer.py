"""Times of calls on a card or on the CPU, with several providers in turn.

On a card: CUDA events around each call, a batch of calls queued before one wait, and between two
calls a write to a buffer larger than any second-level cache, so that every call reads its inputs
from memory. A sleeping kernel holds the queue until all of the batch is in it: the time is the
card's, without the gaps in which Python prepares a launch. (The step benchmark tells how many
launches a step has and what its gaps cost.) On the CPU: `perf_counter` around each call.

Providers alternate batch by batch, so that clocks and temperature treat them alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from anima_fast.measure.rates import MeasuredCard, measured_card

Call = Callable[[], object]
# Larger than the second-level cache of any card so far (126 MB, B200 data sheet).
FLUSH_BYTES = 256 << 20
# Launches that fit into a card's queue are about a thousand: a batch stays far below.
BATCH = 10
# Cycles a second of `torch.cuda._sleep`, above every card's clock, and the longest hold.
SLEEP_HZ, LONGEST_HOLD_S = 3e9, 0.25
# On the CPU, where nothing is judged by these numbers: one copy and one product.
CPU_COPY_BYTES, CPU_PRODUCT_SIZE, CPU_REPEATS = 1 << 25, 512, 5


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: bytes and operations a second.

    `sheet_peak` is the data sheet's, None where the card's name is not in `cards.CARDS`. `measured`
    tells how they were found, on a card.
    """

    bandwidth: float
    peak: float
    sheet_peak: float | None = None
    measured: MeasuredCard | None = None


def ceilings() -> Ceilings:
    """Time a long copy and a large product: bfloat16 on a warm card, float32 on the CPU."""
    if torch.cuda.is_available():
        found = measured_card()
        rates, sheet = found.rates, found.card.bf16_tflops * 1e12
        known = None if sheet == rates.tensor else sheet
        return Ceilings(rates.bandwidth, rates.tensor, known, found)
    source, target = (torch.ones(CPU_COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    a = torch.randn(CPU_PRODUCT_SIZE, CPU_PRODUCT_SIZE)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ a}
    timer = Timer(calls)
    for _ in range(CPU_REPEATS):
        timer.round()
    best = {name: min(times) for name, times in timer.seconds.items()}
    return Ceilings(2 * CPU_COPY_BYTES / best["copy"], 2 * CPU_PRODUCT_SIZE**3 / best["product"])


def on_card() -> bool:
    """Whether measurements run on a card."""
    return torch.cuda.is_available()


@dataclass
class Timer:
    """Seconds per call of several providers, in rounds.

    Attributes:
        calls: by provider; a call that fails in `warm` is taken out.
        before: what runs untimed before a provider's turn.
        batch: calls of each provider in a round, on a card.
        flush: empty the cache and hold the queue; without it the gaps between launches count too.
        watch: called in the midst of each batch on a card, with the provider.
        seconds: all samples by provider.
        failed: provider → reason.
    """

    calls: dict[str, Call]
    before: Mapping[str, Call] = field(default_factory=dict)
    batch: int = BATCH
    flush: bool = True
    watch: Callable[[str], object] = lambda name: None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    _hold: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A copy: failed calls are taken out of it.
        self.calls = dict(self.calls)
        self.seconds = {name: [] for name in self.calls}
        self._buffer = None
        if on_card() and self.flush:
            self._buffer = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def warm(self, times: int = 3) -> float:
        """Run every call a few times (compilation, autotuning); seconds of one last round.

        A provider that fails, out of memory too, is left out from then on, with its reason.
        """
        for name in list(self.calls):
            try:
                self._prepare(name)
                for _ in range(times):
                    self.calls[name]()
                synchronize()
                start = time.perf_counter()
                self.calls[name]()
                # So far the call was only queued: the queue must be held that long for each one.
                self._hold[name] = time.perf_counter() - start
                synchronize()
            except Exception as error:
                self.drop(name, reason(error))
        start = time.perf_counter()
        self.round()
        for samples in self.seconds.values():
            samples.clear()
        return time.perf_counter() - start

    def drop(self, name: str, why: str) -> None:
        """Leave a provider out from now on."""
        self.failed[name] = why
        del self.calls[name]
        self.seconds.pop(name)
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()

    def round(self) -> None:
        """One batch of every provider; one that fails, out of memory say, is left out."""
        for name, call in list(self.calls.items()):
            try:
                self._prepare(name)
                if on_card():
                    self.seconds[name] += self._batch_on_card(name, call)
                else:
                    start = time.perf_counter()
                    call()
                    self.seconds[name].append(time.perf_counter() - start)
            except Exception as error:
                self.drop(name, reason(error))

    def _prepare(self, name: str) -> None:
        if name in self.before:
            self.before[name]()

    def _batch_on_card(self, name: str, call: Call) -> list[float]:
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.batch)
        ]
        torch.cuda.synchronize()
        if self._buffer is not None:
            seconds = min(1.5 * self._hold.get(name, 0.0) * self.batch, LONGEST_HOLD_S)
            torch.cuda._sleep(int(seconds * SLEEP_HZ))
        for begin, end in marks:
            if self._buffer is not None:
                self._buffer.zero_()
            begin.record()
            call()
            end.record()
        # All is queued, so waiting here holds nothing up. Afterwards the card would be idle.
        marks[self.batch // 2][0].synchronize()
        self.watch(name)
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def synchronize() -> None:
    """Wait for the card, where there is one."""
    if on_card():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """An error in one short line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
