"""What a run consists of, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import Conditioning
from anima_fast.data.items import DatasetPlan, Length
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.flow import FlowSettings
from anima_fast.training.kind import Network, Training
from anima_fast.training.optimizers.weight_updates import WeightUpdates
from anima_fast.training.preview_prompts import PreviewPrompts
from anima_fast.training.sigma_bins import SigmaBins
from anima_fast.training.state_checks import dataset_fingerprint

if TYPE_CHECKING:
    from anima_fast.models.vae import VAE
    from anima_fast.options.run import FinetuneOptions, TrainOptions


class LossScaler(torch.amp.GradScaler):
    """PyTorch's loss scaling, for parameters that are float16 themselves too (`full_fp16`)."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        if isinstance(optimizer, WeightUpdates):
            return optimizer.unscale(inv_scale, found_inf)
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@dataclass
class Run:
    """All that the loop works with, on the device and ready for the first step."""

    options: TrainOptions | FinetuneOptions
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
    scaler: torch.amp.GradScaler
    # Where latents are not cached.
    vae: VAE | None = None
    # Where previews are asked for.
    prompts: PreviewPrompts | None = None
    # Whether blocks, loss and optimizer run through the project's kernels.
    fused: bool = False

    @property
    def network(self) -> Network:
        """What is trained."""
        return self.training.network

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains it."""
        return self.training.optimizer

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
