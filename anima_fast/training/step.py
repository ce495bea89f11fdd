"""One micro-step: a batch in, per-sample losses out. Shared by training and validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.data.batches import Batch
from anima_fast.data.seeding import seeded
from anima_fast.models.flow import (
    FlowSettings,
    flow_loss,
    fused_flow_loss,
    noisy_latents,
    sample_sigma,
    velocity_target,
)

if TYPE_CHECKING:
    from anima_fast.training.run import Run


def micro_step(run: Run, batch: Batch, settings: FlowSettings, *, step: int, micro: int) -> Tensor:
    """Per-sample losses [B] (fp32, with the dataset's loss weights) of one batch.

    The global generators are seeded from (seed, step, micro) first: noise, σ and every dropout of
    this micro-step depend on nothing else.
    """
    torch.manual_seed(seeded("step", run.seed, step, micro).getrandbits(63))
    latents = batch_latents(run, batch)
    noise = torch.randn_like(latents)
    if batch.sigma is not None:
        sigma = batch.sigma.to(latents.device, non_blocking=True)
    else:
        sigma = sample_sigma(settings, len(latents), latents.shape[-2:], device=latents.device)
    losses = batch_loss(run, batch, latents, noise, sigma, settings)
    run.sigma_bins.add(sigma, losses.detach())
    return losses * batch.loss_weights.to(losses)


def batch_latents(run: Run, batch: Batch) -> Tensor:
    """Clean latents [B, 16, h, w] fp32 on the device, encoded now when they were not cached."""
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    with torch.no_grad():
        pixels = batch.pixels.to(run.device)
        latents = run.vae.encode(pixels, chunk_rows=run.options.vae_chunk_size).float()
        # Noise is drawn in memory order, so the layout must be the one of cached latents.
        return latents.contiguous()


def batch_loss(
    run: Run, batch: Batch, latents: Tensor, noise: Tensor, sigma: Tensor, settings: FlowSettings
) -> Tensor:
    """Per-sample flow loss [B] of the network's velocity at noise level σ [B]."""
    run.network.multiplier = batch.items[0].dataset.network_multiplier
    run.network.at_noise(sigma)
    x = noisy_latents(latents, noise, sigma, settings)
    context, zero_keys = run.conditioning(batch.text)
    velocity = run.dit(x.to(run.dit.dtype), sigma, context, zero_keys=zero_keys)
    masks = None if batch.masks is None else batch.masks.to(latents)
    if run.fused:
        return fused_flow_loss(velocity, latents, noise, sigma, settings, masks=masks)
    return flow_loss(velocity, velocity_target(latents, noise), sigma, settings, masks=masks)
