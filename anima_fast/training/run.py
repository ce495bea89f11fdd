"""What a run consists of, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import Conditioning
from anima_fast.data.items import DatasetPlan
from anima_fast.data.length import Length
from anima_fast.models.dit import AnimaDiT
from anima_fast.options.run import FinetuneOptions
from anima_fast.training.adapter_setup import base_files
from anima_fast.training.network import Network
from anima_fast.training.optimizers.ema import Ema
from anima_fast.training.optimizers.weight_updates import WeightUpdates
from anima_fast.training.previews import Previews
from anima_fast.training.sigma_bins import SigmaBins
from anima_fast.training.state import dataset_fingerprint

if TYPE_CHECKING:
    from anima_fast.models.vae import VAE
    from anima_fast.options.run import TrainOptions


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
    device: torch.device
    seed: int
    plan: DatasetPlan
    batches: Batches
    length: Length
    dit: AnimaDiT
    vae: VAE | None
    conditioning: Conditioning
    network: Network
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    # Whether blocks, loss and optimizer run through the project's kernels.
    fused: bool = False
    # The running mean of the weights.
    ema: Ema | None = None
    previews: Previews | None = None

    @cached_property
    def sigma_bins(self) -> SigmaBins:
        """Training losses by noise level."""
        return SigmaBins(self.device)

    @property
    def fingerprint(self) -> dict:
        """What a run that resumes must share with the one that was saved."""
        found = dataset_fingerprint(self.plan, self.length.accumulation)
        if not trains_all(self.options) and self.options.base_weights:
            files = base_files(self.options)
            found["base_weights"] = [f"{Path(path).name} {strength:g}" for path, strength in files]
        return found


def trains_all(options: TrainOptions | FinetuneOptions) -> bool:
    """Full fine-tuning, as against a network beside the model."""
    return isinstance(options, FinetuneOptions)


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    log: Path
    steps: int
    loss: float | None
    interrupted_by: int | None = None
