"""How long a run is, in batches, epochs and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from anima_fast.options.output import LengthOptions


@dataclass(frozen=True)
class Length:
    """How long the run is (spec: steps count optimizer updates)."""

    batches_per_epoch: int
    accumulation: int
    epochs: int
    steps: int

    @property
    def updates_per_epoch(self) -> int:
        """⌈batches / accumulation⌉: an incomplete accumulation group at the end is stepped."""
        return math.ceil(self.batches_per_epoch / self.accumulation)


def run_length(options: LengthOptions, batches_per_epoch: int) -> Length:
    """Epochs and steps from whichever of the two was given; epochs win."""
    accumulation = options.gradient_accumulation_steps
    updates = math.ceil(batches_per_epoch / accumulation)
    if options.max_train_epochs:
        epochs, steps = options.max_train_epochs, options.max_train_epochs * updates
    else:
        steps = options.max_train_steps
        epochs = math.ceil(steps / updates)
    return Length(batches_per_epoch, accumulation, epochs, steps)
