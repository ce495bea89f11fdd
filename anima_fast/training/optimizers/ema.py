"""A running mean of the trained weights: mean ← mean + (1 − d)·(weights − mean), one launch.

The decay d rises from 0.1 with the steps, d_t = min(decay, (1 + t) / (10 + t)), so that the first
values, which are mostly the starting point, do not linger (as TensorFlow's
ExponentialMovingAverage does with `num_updates`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint


class Ema:
    """The mean [P], float32, of a flat buffer of weights [P] of any float dtype, where it starts.

    `decay` is d, from 0 (no memory) to below 1, `updates` is t.
    """

    def __init__(self, weights: Tensor, decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.mean = weights.detach().float().clone()
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the mean; called after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.mean.lerp_(self.weights.to(self.mean.dtype), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the current weights."""
        self.mean.copy_(self.weights)
        self.updates = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume state holds."""
        return {"mean": self.mean, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Restore what `state_tensors` returned; `UserError` for the mean of another network."""
        mean = checkpoint.get("mean")
        if mean.shape != self.mean.shape:
            raise UserError(f"{checkpoint.name} is the running mean of another network")
        self.mean.copy_(mean)
        self.updates = int(checkpoint.get("updates"))

    def in_place(self) -> AbstractContextManager[None]:
        """Inside the block the network computes with the mean, and saves it."""
        return exchanged(self.weights, self.mean)


@contextmanager
def exchanged(weights: Tensor, values: Tensor) -> Iterator[None]:
    """Inside the block the weights have other values, of any dtype."""
    with torch.no_grad():
        own = weights.detach().clone()
        weights.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            weights.copy_(own)
