"""How far a run has got: the few numbers that a resume state must hold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field


@dataclass
class Position:
    """Counters of a run.

    `step` counts the optimizer steps made, `epoch` counts from 1, `batch` counts the batches of
    this epoch already used. `losses` holds the last loss of each step of an epoch (their mean is
    the smoothed loss that is shown). `best_loss` is the lowest validation loss, `best_step` its
    step, and `stale` counts the validations since.
    """

    step: int = 0
    epoch: int = 1
    batch: int = 0
    losses: list[float] = field(default_factory=list)
    slot: int = 0
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0

    @property
    def loss_average(self) -> float | None:
        """Moving average of the loss over one epoch."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def last_epoch(self) -> int:
        """The epoch of the last step, 0 before the first."""
        return self.epoch if self.batch else self.epoch - 1

    def advance(self, batches: int, loss: float, slots: int) -> None:
        """Count an optimizer step over `batches` micro-batches with this mean loss."""
        self.batch += batches
        self.step += 1
        self.record_loss(loss, slots)

    def record_loss(self, loss: float, slots: int) -> None:
        """Record the loss of a step in its slot of the epoch (`slots` steps an epoch).

        A loss that is not finite (a skipped batch) does not change the average.
        """
        if not math.isfinite(loss):
            return
        if len(self.losses) < slots:
            self.losses.append(loss)
        else:
            self.losses[self.slot % slots] = loss
        self.slot = (self.slot + 1) % slots

    def record_validation(self, loss: float, min_delta: float) -> bool:
        """Count a validation and return whether it is the best so far, by more than `min_delta`.

        A loss that is not finite is never the best.
        """
        least = math.inf if self.best_loss is None else self.best_loss - min_delta
        if loss < least:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            return True
        self.stale += 1
        return False

    def next_epoch(self) -> None:
        """Go to the first batch of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def as_dict(self) -> dict:
        """For the resume state; `Position(**d)` restores it."""
        return asdict(self)
