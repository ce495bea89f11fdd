"""Rectified flow: noise levels, noisy latents, targets and losses. Pure functions, all in float32.

    x = (1 − σ)·x0 + σ·noise        target v = noise − x0        loss w(σ)·ℓ(v̂ − v)

The model's time is σ itself, in (0, 1). Latents are [B, 16, h, w] (or [B, 16, 1, h, w]), σ is [B].
Names of the samplers, weightings and losses are those of sd-scripts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.kernels.losses import element_loss, per_sample
from anima_fast.models.flow_settings import FlowSettings

TABLE_SIZE = 1000


def sample_sigma(
    settings: FlowSettings,
    batch_size: int,
    latent_hw: tuple[int, int],
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One independent σ per sample, [B] float32; only `flux_shift` depends on `latent_hw`.

    The generator is one of `device`; the global one when None.
    """
    if settings.timestep_sampling == "sigma" and settings.weighting_scheme == "logit_normal":
        normal = torch.randn(batch_size, generator=generator, device=device)
        draw = settings.logit_mean + settings.logit_std * normal
    elif settings.timestep_sampling in ("sigma", "uniform"):
        draw = torch.rand(batch_size, generator=generator, device=device)
    else:
        draw = torch.randn(batch_size, generator=generator, device=device)
    return sigma_from_draw(settings, draw, latent_hw)


def sigma_from_draw(settings: FlowSettings, draw: Tensor, latent_hw: tuple[int, int]) -> Tensor:
    """The random numbers of `sample_sigma` as σ [B] float32, within `settings.sigma_range`.

    `draw` [B] is standard normal for sigmoid, shift and flux_shift; uniform in [0, 1) for uniform
    and sigma; N(logit_mean, logit_std) for sigma with weighting logit_normal.
    """
    draw = draw.float()
    mode, shift = settings.timestep_sampling, settings.discrete_flow_shift
    if mode == "uniform":
        sigma = draw
    elif mode == "sigma":
        sigma = _table_sigma(settings, draw)
    else:
        sigma = torch.sigmoid(settings.sigmoid_scale * draw)
        if mode == "shift":
            sigma = shift_sigma(sigma, shift)
        elif mode == "flux_shift":
            sigma = shift_sigma(sigma, flux_shift(latent_hw))
    low, high = settings.sigma_range
    return sigma if (low, high) == (0.0, 1.0) else low + sigma * (high - low)


def _table_sigma(settings: FlowSettings, draw: Tensor) -> Tensor:
    """Entry ⌊1000·u⌋ of the descending table of 1000 shifted levels 1, 0.999, … 0.001."""
    u = draw
    if settings.weighting_scheme == "logit_normal":
        u = torch.sigmoid(draw)
    elif settings.weighting_scheme == "mode":
        bend = torch.cos(math.pi * draw / 2) ** 2 - 1 + draw
        u = 1 - draw - settings.mode_scale * bend
    index = (u * TABLE_SIZE).long().clamp(0, TABLE_SIZE - 1)
    return shift_sigma((TABLE_SIZE - index).float() / TABLE_SIZE, settings.discrete_flow_shift)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """S·σ / (1 + (S − 1)·σ): S above 1 moves σ towards noise."""
    return sigma if shift == 1 else shift * sigma / (1 + (shift - 1) * sigma)


def flux_shift(latent_hw: tuple[int, int]) -> float:
    """The shift e^μ of `flux_shift`, μ linear in the count of 2x2 latent patches."""
    patches = (latent_hw[0] // 2) * (latent_hw[1] // 2)
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (patches - 256))


def inference_sigmas(steps: int, shift: float) -> Tensor:
    """The sampling schedule: `steps` + 1 float32 levels from 1 down to 0, shifted."""
    return shift_sigma(torch.linspace(1, 0, steps + 1), shift)


def noisy_latents(
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    settings: FlowSettings | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x = (1 − σ)·x0 + σ·noise, in float32; latents and noise [B, ...], σ [B].

    With `settings.ip_noise_gamma` γ the noise gets γ·N(0, 1) added here and nowhere else, from a
    generator on its device; with `ip_noise_gamma_random_strength` γ is scaled by one uniform
    number per call.
    """
    latents, noise = latents.float(), noise.float()
    if settings is not None and settings.ip_noise_gamma:
        gamma: Tensor | float = settings.ip_noise_gamma
        if settings.ip_noise_gamma_random_strength:
            gamma = gamma * torch.rand(1, generator=generator, device=noise.device)
        extra = torch.randn(noise.shape, generator=generator, device=noise.device)
        noise = noise + gamma * extra
    sigma = per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: noise − x0, in float32."""
    return noise.float() - latents.float()


def loss_weight(scheme: str, sigma: Tensor) -> Tensor:
    """w(σ) [B]: σ⁻² for sigma_sqrt, 2/(π(1 − 2σ + 2σ²)) for cosmap, else 1."""
    sigma = sigma.float()
    if scheme == "sigma_sqrt":
        # A uniform draw can be exactly 0, and one infinite weight would spoil the step.
        return sigma.clamp_min(1e-6) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def huber_delta(settings: FlowSettings, sigma: Tensor) -> Tensor:
    """The threshold c [B] of huber and smooth_l1: c·scale, or c^σ·scale when exponential.

    `snr`, the default of sd-scripts, is not defined for flow models and means constant. sd-scripts
    feeds σ in 0..1 to an exponent made for 0..1000; this is the curve that was meant.
    """
    sigma = sigma.float()
    if settings.huber_schedule == "exponential":
        return settings.huber_scale * settings.huber_c**sigma
    return torch.full_like(sigma, settings.huber_c * settings.huber_scale)


def mask_cells(mask: Tensor, latent_hw: tuple[int, int], *, normalize: bool = False) -> Tensor:
    """A pixel mask [B, H, W] or [B, 1, H, W], averaged over each latent cell: [B, 1, h, w]."""
    if mask.ndim == 3:
        mask = mask[:, None]
    cells = F.interpolate(mask.float(), size=tuple(latent_hw), mode="area")
    if normalize:
        cells = cells / cells.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return cells


def apply_mask(loss: Tensor, mask: Tensor, *, normalize: bool = False) -> Tensor:
    """Multiply an unreduced loss [B, C, h, w] (or 5-D) by a pixel mask [B, H, W] or [B, 1, H, W].

    The plain form is not divided by the mask's area, so a small mask gives a small gradient; with
    `normalize` each sample is divided by its mask's mean, so that its own mean is that over the
    mask alone (an empty mask stays 0).
    """
    cells = mask_cells(mask.to(loss.device), loss.shape[-2:], normalize=normalize)
    return loss * (cells if loss.ndim == 4 else cells[:, :, None])


def flow_loss(
    prediction: Tensor,
    target: Tensor,
    sigma: Tensor,
    settings: FlowSettings,
    *,
    masks: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> Tensor:
    """The loss per sample [B]: element loss · w(σ) → · mask → mean over (C, h, w) → · loss weight.

    Args:
        prediction, target: [B, C, h, w] (or 5-D), any float dtype.
        sigma: [B].
        masks: pixel masks [B, 1, H, W] in [0, 1], or None.
        loss_weights: [B], the dataset's weight per sample (regularisation images), or None.
    """
    sigma = sigma.to(prediction.device)
    d = prediction.float() - target.float()
    loss = element_loss(d, settings.loss_type, huber_delta(settings, sigma))
    loss = loss * per_sample(loss_weight(settings.weighting_scheme, sigma), loss)
    if masks is not None:
        loss = apply_mask(loss, masks, normalize=settings.masked_loss_normalize)
    losses = loss.flatten(1).mean(1)  # [B]
    if loss_weights is not None:
        losses = losses * loss_weights.to(losses)
    return losses


def fused_flow_loss(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    settings: FlowSettings,
    *,
    masks: Tensor | None = None,
) -> Tensor:
    """`flow_loss` against `velocity_target`, loss and gradient in one pass: [B] float32."""
    # Imported here so that `flow_loss` runs without Triton.
    from anima_fast.kernels.flow_loss import flow_loss as one_pass

    sigma = sigma.to(prediction.device)
    cells = None
    if masks is not None:
        normalize = settings.masked_loss_normalize
        cells = mask_cells(masks.to(prediction.device), prediction.shape[-2:], normalize=normalize)
    return one_pass(
        prediction,
        latents.float(),
        noise.float(),
        loss_weight(settings.weighting_scheme, sigma),
        loss_type=settings.loss_type,
        c=huber_delta(settings, sigma),
        cells=cells,
    )
