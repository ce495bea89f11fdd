"""What a run consists of, how far it has got, and what it leaves behind."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import Conditioning
from anima_fast.data.items import DatasetPlan, Length
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.flow import FlowSettings
from anima_fast.training.kind import AnyOptions, Network, Training
from anima_fast.training.optimizers.weight_updates import WeightUpdates
from anima_fast.training.preview_prompts import PreviewPrompts
from anima_fast.training.state_checks import dataset_fingerprint

if TYPE_CHECKING:
    from anima_fast.models.vae import VAE


# What the loss scale makes the largest gradient behind the last block at first, and its limit.
FIRST, LARGEST_POWER = 16.0, 40
# Of σ, in which training losses are averaged.
BINS = 10


@dataclass
class Position:
    """Counters of a run.

    `step` counts the optimizer steps, `made` those whose gradient was finite and used, `epoch`
    counts from 1, `batch` counts the batches of this epoch already used. `losses` holds the last
    loss of each step of an epoch (their mean is the smoothed loss that is shown). `best_loss` is
    the lowest validation loss, `best_step` its step, and `stale` counts the validations since.
    """

    step: int = 0
    made: int = 0
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
        """Count an optimizer step over `batches` micro-batches with this mean loss.

        The loss goes to its slot of the epoch, which has `slots` steps. One that is not finite (a
        skipped batch) does not change the average.
        """
        self.batch += batches
        self.step += 1
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


class SigmaBins:
    """Training loss by noise level: sums in ten bins of σ, made on the device without waiting."""

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


class LossScaler(torch.amp.GradScaler):
    """PyTorch's loss scaling, for parameters that are float16 themselves too (`full_fp16`).

    A new run starts with the scale that brings the largest gradient behind the last block to
    `FIRST`, far from both ends of float16; a resumed one with the scale of its state.
    """

    def __init__(self, device: str, *, enabled: bool) -> None:
        super().__init__(device, enabled=enabled)
        self._begun = not enabled
        self._behind: Tensor | None = None

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on with a saved scale."""
        super().load_state_dict(state_dict)
        self._begun = True

    @contextmanager
    def first_backward(self, final_layer: nn.Module) -> Iterator[None]:
        """Inside the block the first `backward` may look at the input of the final layer."""
        if self._begun:
            yield
            return

        def keep(_layer: nn.Module, inputs: tuple) -> None:
            # With several micro-batches the first sets the scale.
            self._behind = None if self._begun else inputs[0]

        hook = final_layer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            # When memory ran out this must not hold the failed forward.
            hook.remove()
            self._behind = None

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss, scaled; the first one sets the scale."""
        behind = self._behind
        if not self._begun and behind is not None and behind.requires_grad:
            (gradient,) = torch.autograd.grad(loss, behind, retain_graph=True)
            largest = gradient.abs().amax().item()
            if 0 < largest < math.inf:
                power = math.floor(math.log2(FIRST / largest))
                self._init_scale = 2.0 ** min(max(power, 0), LARGEST_POWER)
            self._begun, self._behind = True, None
        self.scale(loss).backward()

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        if isinstance(optimizer, WeightUpdates):
            return optimizer.unscale(inv_scale, found_inf)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@dataclass
class Run:
    """All that the loop works with, on the device and ready for the first step."""

    options: AnyOptions
    folder: Path
    training: Training
    device: torch.device
    seed: int
    plan: DatasetPlan
    batches: Batches
    length: Length
    dit: AnimaDiT
    conditioning: Conditioning
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: LossScaler
    # Where latents are not cached.
    vae: VAE | None = None
    # Where previews are asked for.
    prompts: PreviewPrompts | None = None
    # The same after each resume; tells the states of this run from those of others.
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def network(self) -> Network:
        """What is trained."""
        return self.training.network

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains it."""
        return self.training.optimizer

    @property
    def fused(self) -> bool:
        """Whether blocks, loss and optimizer run through the project's kernels."""
        return self.training.fused

    @cached_property
    def flow(self) -> FlowSettings:
        """How noise levels are drawn and losses weighted."""
        return FlowSettings.from_options(self.options)

    @cached_property
    def sigma_bins(self) -> SigmaBins:
        """Training losses by noise level."""
        return SigmaBins(self.device)

    @property
    def fingerprint(self) -> dict:
        """What a run that resumes must share with the one that was saved."""
        dataset = dataset_fingerprint(self.plan, self.length.accumulation)
        return dataset | self.training.fingerprint()


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    log: Path
    steps: int
    loss: float | None
    interrupted_by: int | None = None
