"""Counts of values that float16 could not hold, by the layer whose product made them.

Products with float16 results hold them within ±65504 (kernels/gemm.py) and count what was beyond
in one tensor on the device, which is read with whatever else a step waits for. A count means that
the layer computes something else than it does in bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Saturation:
    """One count for each named layer."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.counts = torch.zeros(len(self.names), dtype=torch.int32, device=device)
        self._told: set[str] = set()

    def total(self) -> Tensor:
        """All counts together, float32 on the device."""
        return self.counts.sum().float()

    def take(self) -> dict[str, int]:
        """The counts above zero by layer; they start again from zero. Waits for the device."""
        counts = self.counts.tolist()
        self.counts.zero_()
        return {name: n for name, n in zip(self.names, counts, strict=True) if n}

    def tell(
        self,
        say: Callable[[str], None],
        remedy: str = "--mixed_precision bf16 when the loss suffers",
    ) -> int:
        """`take`, with a line about layers that were not told before; returns how many values."""
        found = self.take()
        new = {name: n for name, n in found.items() if name not in self._told}
        self._told |= new.keys()
        if new:
            most = max(new, key=lambda name: new[name])
            others = f" and {len(new) - 1} more layers" if len(new) > 1 else ""
            say(
                f"float16 cannot hold {sum(new.values())} results of {most}{others}, they were cut "
                f"at 65504: use {remedy}"
            )
        return sum(found.values())
