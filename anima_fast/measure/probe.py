"""How long a float16 sum may be here: one product of random numbers against float64 decides.

A card's documents do not say how it rounds a float16 sum. To nearest, sums of 64 terms have a
quarter of bf16's error; rounding towards zero makes every product a little smaller (its common
gain is below 1), which shorter sums halve.

    error = ‖y − exact‖ / ‖exact‖        gain = ⟨y, exact⟩ / ⟨exact, exact⟩ − 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Lengths of a float16 sum, the preferred first.
CHAINS = (64, 32)
# A gain beyond this asks for the shorter sums.
LARGEST_GAIN = 2e-4
# Of the bf16 product's error, what a product may have.
SHARE = 0.5
ROWS, TERMS, COLUMNS = 256, 2048, 256

# (a [M, K] float16, b [K, N] float16, chain) → a @ b [M, N] in float32
Product = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Probe:
    """One product with sums of `chain` terms: its error, its common gain, and bf16's error."""

    chain: int
    error: float
    gain: float
    bf16_error: float

    @property
    def accepted(self) -> bool:
        """Whether sums of this length are good enough; no number (an overflow) is not."""
        last = self.chain == CHAINS[-1]
        return self.error <= SHARE * self.bf16_error and (last or abs(self.gain) <= LARGEST_GAIN)


def choose_chain(measure: Callable[[int], Probe]) -> tuple[int, Probe]:
    """Terms of a float16 sum, or 0 for float32 sums, and the last probe that was made.

    `measure` makes the probe of a length; the shorter one is measured only where the longer is not
    accepted.
    """
    for chain in CHAINS:
        found = measure(chain)
        if found.accepted:
            return chain, found
    return 0, found


def probe(product: Product, chain: int, device: torch.device | str = "cpu") -> Probe:
    """Measure sums of `chain` terms: float32 inputs, weights that bf16 holds, K = 2048."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, TERMS, generator=generator)
    b = (torch.randn(TERMS, COLUMNS, generator=generator) * TERMS**-0.5).bfloat16()
    exact = a.double() @ b.double()
    y = product(a.half().to(device), b.half().to(device), chain).double().cpu()
    bf16 = a.bfloat16().double() @ b.double()
    gain = (y * exact).sum() / exact.square().sum() - 1
    return Probe(chain, _error(y, exact), gain.item(), _error(bf16, exact))


def _error(y: Tensor, exact: Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()
