"""Euler steps of the rectified flow, with classifier-free guidance.

σ_i = S·s_i / (1 + (S − 1)·s_i),  s = 1 … 0 in `steps` equal steps
v   = v_neg + g·(v_pos − v_neg)                     two forwards; one when g = 1
x   ← x + (σ_{i+1} − σ_i)·v                         x and v in float32, x_0 = noise
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anima_fast.models.dit import AnimaDiT
from anima_fast.models.flow import inference_sigmas
from anima_fast.models.vae import LATENT_CHANNELS, LATENT_SCALE
from anima_fast.sampling.prompts import Job
from anima_fast.sampling.texts import zero_keys


@torch.no_grad()
def euler_sample(
    dit: AnimaDiT,
    noise: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    steps: int,
    shift: float,
    guidance: float = 1.0,
    zero_keys: int | None = None,
    negative_zero_keys: int | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """The latents at the end of the flow.

    Args:
        dit: the model `(x, sigma [B], context, zero_keys=) -> velocity`.
        noise: [B, 16, H, W] or [B, 16, 1, H, W], on any device.
        positive, negative: contexts [B, S, C]; `negative` is needed when guidance is not 1.
        steps, shift: of the schedule.
        guidance: g of the module docstring.
        zero_keys, negative_zero_keys: zero text rows beyond each context, see `AnimaDiT.forward`.
        start: normalised latents x₀ of the noise's shape to start from, see `strength`.
        strength: fraction of the noise schedule to run, from 0 to 1: the schedule has
            ⌊steps / strength⌋ steps and the last `steps` of them are made, from
            (1 − σ)·x₀ + σ·noise. ComfyUI calls it denoise. 1 starts from noise alone.
        on_step: called after each step.

    Returns normalised latents of the noise's shape, float32, on the device of the context. Raises
    `ValueError` for guidance without a negative context, or strength without a start.
    """
    if guidance != 1 and negative is None:
        raise ValueError(f"guidance {guidance} needs a negative context")
    if strength != 1 and start is None:
        raise ValueError(f"strength {strength} needs latents to start from")
    x = noise.to(positive.device, torch.float32)
    sigmas = inference_sigmas(int(steps / strength), shift)[-(steps + 1) :].to(x.device)
    if strength != 1 and start is not None:
        x = (1 - sigmas[0]) * start.to(x) + sigmas[0] * x
    for i in range(steps):
        sigma = sigmas[i].expand(len(x))
        velocity = dit(x, sigma, positive, zero_keys=zero_keys).float()
        if guidance != 1:
            opposite = dit(x, sigma, negative, zero_keys=negative_zero_keys).float()
            velocity = opposite + guidance * (velocity - opposite)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        if on_step is not None:
            on_step()
    return x


def start_noise(seed: int, width: int, height: int) -> Tensor:
    """Noise [1, 16, 1, H/8, W/8] float32 of a picture in pixels, drawn on the CPU from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        1, LATENT_CHANNELS, 1, height // LATENT_SCALE, width // LATENT_SCALE, generator=generator
    )


def sample_jobs(
    dit: AnimaDiT,
    jobs: Sequence[Job],
    contexts: Sequence[Tensor],
    *,
    start: Tensor | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents [B, 16, 1, H/8, W/8] of jobs that differ in their seed only.

    contexts: [1, S, C] of each of the jobs' `texts`. start, on_step: see `euler_sample`.
    """
    job = jobs[0]
    expanded = [context.expand(len(jobs), -1, -1) for context in contexts]
    return euler_sample(
        dit,
        torch.cat([start_noise(one.seed, one.width, one.height) for one in jobs]),
        expanded[0],
        expanded[1] if len(expanded) > 1 else None,
        steps=job.steps,
        shift=job.shift,
        guidance=job.cfg,
        zero_keys=zero_keys(contexts[0]),
        negative_zero_keys=zero_keys(contexts[-1]),
        start=start,
        strength=job.strength,
        on_step=on_step,
    )
