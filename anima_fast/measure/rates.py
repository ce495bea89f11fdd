"""What a card reaches: an assumed share of its data sheet, or one long copy and one large product.

    t = launch + max(bytes / bandwidth, flops / tensor)

is the time of one call at such rates. The constants are assumptions until a card has been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from anima_fast.errors import UserError
from anima_fast.measure.cards import Card, find_card

# Assumed: what a good kernel reaches of the data sheet, and what a launch costs in a queue that the
# processor keeps filled.
BANDWIDTH_SHARE, TENSOR_SHARE, LAUNCH_S = 0.85, 0.75, 4e-6
# Bytes copied and the side of the square product when this machine's card is measured.
COPY_BYTES, PRODUCT_SIZE, REPEATS = 1 << 29, 8192, 10


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


def measured_card() -> tuple[Card, Rates]:
    """The first CUDA card and its measured rates.

    The card's figures are the data sheet's where its name is known, else what was measured.
    Raises `UserError` where there is no card.
    """
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA card here to measure: name one with --card, as rtx-4090")
    # 512 MiB: far beyond any second-level cache.
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_s = _median_seconds(lambda: target.copy_(source))
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device="cuda")
    product_s = _median_seconds(lambda: a @ a)
    # A copy reads and writes.
    rates = Rates(2 * COPY_BYTES / copy_s, 2 * PRODUCT_SIZE**3 / product_s)
    return _described(rates), rates


def _median_seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    spans = sorted(a.elapsed_time(b) for a, b in pairwise(marks))
    return spans[len(spans) // 2] / 1e3


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
    )
