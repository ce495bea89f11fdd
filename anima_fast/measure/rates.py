"""What a card reaches: an assumed share of its data sheet, or a long copy and a large product.

    t = launch + max(bytes / bandwidth, flops / tensor)

is the time of one call at such rates. The constants are assumptions until a card has been measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from anima_fast.errors import UserError
from anima_fast.measure.card_state import CardState
from anima_fast.measure.cards import Card, find_card, float16_sums
from anima_fast.measure.warm import BATCH_S, Warmth, warm_up

# Assumed: what a good kernel reaches of the data sheet, and what a launch costs in a queue that the
# processor keeps filled.
BANDWIDTH_SHARE, TENSOR_SHARE, LAUNCH_S = 0.85, 0.75, 4e-6
# Bytes copied and the side of the square product when this machine's card is measured.
COPY_BYTES, PRODUCT_SIZE, REPEATS = 1 << 29, 8192, 10

# The median seconds of a call, and the clock in the midst of the calls (MHz) where it is known.
Timed = tuple[float, float | None]


@dataclass(frozen=True)
class Rates:
    """What a card reaches: bytes a second, tensor-core operations a second, seconds a launch."""

    bandwidth: float
    tensor: float
    launch_s: float = LAUNCH_S

    @classmethod
    def of(cls, card: Card) -> Rates:
        """The assumed share of a card's data sheet."""
        return cls(
            card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE, card.bf16_tflops * 1e12 * TENSOR_SHARE
        )

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """Of one call; 0 for one that does nothing."""
        if not bytes_moved and not flops:
            return 0.0
        return self.launch_s + max(bytes_moved / self.bandwidth, flops / self.tensor)

    def bound(self, bytes_moved: float, flops: float) -> str:
        """What such a call waits for: launch, memory or compute."""
        memory, compute = bytes_moved / self.bandwidth, flops / self.tensor
        if max(memory, compute) < self.launch_s:
            return "launch"
        return "memory" if memory >= compute else "compute"


@dataclass(frozen=True)
class MeasuredCard:
    """What a card reached.

    Attributes:
        card: the data sheet's figures where its name is known, else what was measured.
        rates: after the warm-up.
        cold: in the first calls.
        warmth: the warm-up between the two.
        clock_mhz, cold_clock_mhz: of its multiprocessors during both products; None where
            nvidia-ml-py is missing.
    """

    card: Card
    rates: Rates
    cold: Rates
    warmth: Warmth
    clock_mhz: float | None
    cold_clock_mhz: float | None


def measured_card() -> MeasuredCard:
    """Measure the first CUDA card, cold and warm. Raises `UserError` where there is none."""
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA card here to measure: name one with --card, as rtx-4090")
    # 512 MiB: far beyond any second-level cache.
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device="cuda")
    state = CardState()

    def copy(repeats: int) -> Timed:
        return _timed(lambda: target.copy_(source), repeats, state)

    def product(repeats: int) -> Timed:
        return _timed(lambda: a @ a, repeats, state)

    return cold_and_warm(copy, product, _described)


def cold_and_warm(
    copy: Callable[[int], Timed],
    product: Callable[[int], Timed],
    describe: Callable[[Rates], Card],
    *,
    now: Callable[[], float] = time.perf_counter,
) -> MeasuredCard:
    """Measure, run products until the card is warm, and measure again.

    Args:
        copy, product: so many calls in a row.
        describe: the card with these rates.
        now: the time in seconds.
    """

    def reached() -> tuple[Rates, float | None]:
        product_s, clock = product(REPEATS)
        # A copy reads and writes.
        return Rates(2 * COPY_BYTES / copy(REPEATS)[0], 2 * PRODUCT_SIZE**3 / product_s), clock

    def batch() -> float:
        seconds, clock = product(count)
        return clock or 1 / seconds

    # The first calls load the libraries.
    copy(3), product(3)
    cold, cold_clock = reached()
    count = max(REPEATS, round(BATCH_S * cold.tensor / (2 * PRODUCT_SIZE**3)))
    warmth = warm_up(batch, now=now)
    rates, clock = reached()
    return MeasuredCard(describe(rates), rates, cold, warmth, clock, cold_clock)


def _timed(call: Callable[[], object], repeats: int, state: CardState) -> Timed:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    # Read while the card works: afterwards it is idle and says so.
    marks[repeats // 2].synchronize()
    clock = state.clock_mhz()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return spans[len(spans) // 2] / 1e3, clock


def _described(rates: Rates) -> Card:
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / 2**30
    title = properties.name.removeprefix("NVIDIA ")
    try:
        known = find_card(title)
    except UserError:
        # A card that is not in the table: the measured rate is the peak.
        known = None
    return Card(
        name="measured",
        title=properties.name,
        arch=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        memory_gib=memory_gib,
        bandwidth_gb_s=known.bandwidth_gb_s if known else rates.bandwidth / 1e9,
        bf16_tflops=known.bf16_tflops if known else rates.tensor / 1e12,
        fp32_tflops=known.fp32_tflops if known else 0.0,
        power_w=known.power_w if known else 0,
        float16_sums=float16_sums(properties.name),
    )
