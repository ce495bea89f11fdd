"""Validation loss: held-out images at four fixed noise levels.

σ = 0.2, 0.4, 0.6, 0.8 with noise that depends only on the seed and the batch, the network in eval
mode (no dropout), no caption dropout and no `ip_noise_gamma`, so that two losses differ only
because the weights do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from anima_fast.data.seeding import seeded
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.training.optimizers.build import averaged_weights
from anima_fast.training.step import batch_latents, batch_loss

if TYPE_CHECKING:
    from anima_fast.training.kind import Say
    from anima_fast.training.run import Run

SIGMAS = (0.2, 0.4, 0.6, 0.8)


def validate_or_skip(
    run: Run, say: Say, stopped: Callable[[], bool] | None = None
) -> dict[str, float] | None:
    """`validate`, or None with a message if memory runs out, which must not end a run that fits."""
    for _ in range(2):
        try:
            return validate(run, stopped)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the frames that held the tensors of the failed attempt are gone.
        free_memory(run.device, keep_cached=False)
    say("out of memory: no validation loss this time, training goes on")
    return None


@torch.no_grad()
def validate(run: Run, stopped: Callable[[], bool] | None = None) -> dict[str, float] | None:
    """The loss of the current weights over the validation batches at each σ.

    None if nothing is held out, or if `stopped`, which is asked before each forward, says so.
    """
    indices = run.plan.validation_batches()[: run.options.max_validation_steps]
    if not indices:
        return None
    seed = run.options.validation_seed
    seed = run.seed if seed is None else seed
    settings = replace(run.flow, ip_noise_gamma=None)
    run.network.eval()
    losses = []
    try:
        with averaged_weights(run.optimizer):
            for position, batch_indices in enumerate(indices):
                batch = run.batches.load(batch_indices, epoch=1, step=position, validation=True)
                latents = batch_latents(run, batch)
                for sigma in SIGMAS:
                    if stopped is not None and stopped():
                        return None
                    draw = seeded("validation", seed, position, sigma).getrandbits(63)
                    generator = torch.Generator().manual_seed(draw)
                    noise = torch.randn(latents.shape, generator=generator).to(latents)
                    sigmas = torch.full((len(latents),), sigma, device=latents.device)
                    losses.append(batch_loss(run, batch, latents, noise, sigmas, settings).mean())
    finally:
        run.network.train()
    means = torch.stack(losses).view(-1, len(SIGMAS)).mean(0).tolist()
    return dict(zip(map(str, SIGMAS), means, strict=True))
