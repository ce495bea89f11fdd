"""Training loss by noise level: means in ten bins of σ, summed on the device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10


class SigmaBins:
    """Sums of losses by σ since the last `take`.

    Args:
        device: where losses are.
    """

    def __init__(self, device: torch.device) -> None:
        # Row 0: sums of losses; row 1: counts.
        self._sums = torch.zeros(2, BINS, device=device)

    def copy(self) -> Tensor:
        """The sums since the last `take`, for `restore`."""
        return self._sums.clone()

    def restore(self, copy: Tensor) -> None:
        """Go back to what `copy` returned."""
        self._sums.copy_(copy)

    @torch.no_grad()
    def add(self, sigma: Tensor, losses: Tensor) -> None:
        """Add the losses [B] of samples at σ [B]; those that are not finite are left out."""
        good = torch.isfinite(losses)
        bins = (sigma.float() * BINS).long().clamp(0, BINS - 1)
        values = torch.where(good, losses.float(), 0.0)
        self._sums.index_add_(1, bins, torch.stack([values, good.float()]))

    def take(self) -> dict[str, list]:
        """Means (None for an empty bin) and counts of the ten bins; starts again from zero."""
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        means = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        return {"means": means, "counts": [int(n) for n in counts]}
