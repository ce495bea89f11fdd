"""One optimizer step, in the order in which it happens.

    each micro-batch: noise and σ, forward, loss, backward      `forward_backward`
    all of them:      clip, step, schedule, zero                `optimizer_step`

Validation shares `batch_latents` and `batch_loss`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.data.batches import Batch
from anima_fast.data.seeding import seeded
from anima_fast.memory.free import is_out_of_memory
from anima_fast.models.flow import (
    FlowSettings,
    flow_loss,
    fused_flow_loss,
    noisy_latents,
    sample_sigma,
    velocity_target,
)

if TYPE_CHECKING:
    from anima_fast.training.bad_batches import BadBatchTracker
    from anima_fast.training.oom import MemoryPolicies
    from anima_fast.training.run import Run

# The micro-batches of an optimizer step, each with its losses [B], detached.
Group = list[tuple[Batch, Tensor]]


def forward_backward(
    run: Run, batches: Sequence[Batch], policies: MemoryPolicies, *, step: int
) -> Group:
    """Forward and backward of the micro-batches of one optimizer step; gradients add up.

    When memory runs out all of them are done again at the next lower memory policy. `step` counts
    the optimizer steps made before.

    Raises:
        UserError: memory ran out and nothing is left to give up.
    """
    bins = run.sigma_bins.copy()
    while True:
        try:
            with run.scaler.first_backward(run.dit.final_layer):
                return [
                    (batch, backward(run, micro_step(run, batch, step=step, micro=micro)))
                    for micro, batch in enumerate(batches)
                ]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the frames that held the tensors of the failed attempt are gone.
        run.network.zero_grad_flat()
        run.sigma_bins.restore(bins)
        policies.lower()


def micro_step(run: Run, batch: Batch, *, step: int, micro: int) -> Tensor:
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
        sigma = sample_sigma(run.flow, len(latents), latents.shape[-2:], device=latents.device)
    losses = batch_loss(run, batch, latents, noise, sigma, run.flow)
    run.sigma_bins.add(sigma, losses.detach())
    return losses * batch.loss_weights.to(losses)


def batch_latents(run: Run, batch: Batch) -> Tensor:
    """Clean latents [B, 16, h, w] fp32 on the device, encoded now when they were not cached."""
    if batch.latents is not None:
        return batch.latents.to(run.device, non_blocking=True)
    assert batch.pixels is not None and run.vae is not None
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


def backward(run: Run, losses: Tensor) -> Tensor:
    """Add the gradients of the losses [B] of one micro-batch; returns the losses, detached."""
    # Module dropout may have left out everything that is trained: then the gradient is zero.
    if losses.requires_grad:
        run.scaler.backward(losses.mean() / run.length.accumulation)
    return losses.detach()


def optimizer_step(
    run: Run, group: Group, bad_batches: BadBatchTracker, *, say: Callable[[str], None]
) -> dict:
    """Clip, step unless something is not finite, schedule, zero.

    Returns `loss` (mean), `grad_norm` (before clipping), `saturated` where float16 could not hold
    so many values, and `max_norm` with `scale_weight_norms`.
    """
    run.scaler.unscale_(run.optimizer)
    norm = run.training.clip(run.options.max_grad_norm)
    loss = torch.stack([losses.mean() for _, losses in group]).mean()
    saturation = run.dit.saturation
    # The one wait for the device in a step: all numbers come back together.
    numbers = [loss, norm] if saturation is None else [loss, norm, saturation.total()]
    loss, norm, *beyond = torch.stack(numbers).tolist()
    facts: dict = {"loss": loss, "grad_norm": norm}
    if saturation is not None and any(beyond):
        facts["saturated"] = saturation.tell(say)
    if bad_batches.accepts(group, loss, norm, run.scaler, say=say):
        run.scaler.step(run.optimizer)
        facts |= run.training.after_step()
    run.scaler.update()
    with warnings.catch_warnings():
        # A skipped batch moves the schedule without a step of the optimizer, on purpose.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        run.scheduler.step()
    run.network.zero_grad_flat()
    return facts
