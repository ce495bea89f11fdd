"""A tiny VAE that can show photographs, trained in half a minute on a CPU, for the demo only.

With random weights a decoded latent is noise, and previews would show nothing. Encoder and decoder
are trained separately, which is far faster than through their bottleneck: the encoder to give the
16 strongest principal components of each 8x8 patch, the decoder to turn these components (with a
little noise) back into pixels. The result is blurred, but a cat is a cat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.models.vae import LATENT_MEAN, LATENT_SCALE, LATENT_STD, VAE, VaeConfig

CROP, BATCH = 64, 2
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.1
ENCODER_WEIGHT = 0.2


class PatchComponents:
    """The first `count` principal components of the 8x8 patches of images, of deviation one."""

    def __init__(self, images: Sequence[Tensor], count: int) -> None:
        patches = torch.cat([_patches(image[None], 4)[0].T for image in images])  # [N, 192]
        self.mean = patches.mean(0)
        _, values, axes = torch.linalg.svd(patches - self.mean, full_matrices=False)
        deviation = values[:count] / math.sqrt(len(patches))
        # Weak components would be mostly noise at deviation one.
        self.axes = axes[:count] / deviation.clamp_min(0.05 * deviation[0])[:, None]

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, count, H/8, W/8]."""
        batch, _, height, width = images.shape
        centred = _patches(images, LATENT_SCALE) - self.mean[:, None]
        return (self.axes @ centred).view(batch, -1, height // LATENT_SCALE, width // LATENT_SCALE)


def _patches(images: Tensor, stride: int) -> Tensor:
    return F.unfold(images, LATENT_SCALE, stride=stride)  # [B, 192, N]


def fit_vae(
    images: Sequence[Tensor],
    *,
    width: int = 16,
    steps: int = 300,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> VAE:
    """Train a VAE on a few images.

    Args:
        images: tensors [3, H, W] in [-1, 1], H and W at least 64.
        steps: of training; the loss after 300 is about a third of that after the first.
        on_step: called with the number of finished steps and the loss.
    Returns:
        The VAE in eval mode, float32, on the CPU.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        vae = VAE(VaeConfig(width=width))
    generator = torch.Generator().manual_seed(seed)
    components = PatchComponents(images, vae.config.latent)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (LATENT_MEAN, LATENT_STD))
    for step in range(steps):
        x = torch.stack([_crop(images, generator) for _ in range(BATCH)])
        target = components(x)
        noisy = target + LATENT_NOISE * torch.randn(target.shape, generator=generator)
        # Not `decode`: it clamps, and a clamped pixel has no gradient.
        decoded = vae.decoder(vae.from_latents(noisy * std + mean))
        loss = (decoded - x).abs().mean() + ENCODER_WEIGHT * F.mse_loss(vae.encode(x), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return vae.requires_grad_(False).eval()


def _crop(images: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    image = images[draw(len(images))]
    y, x = (draw(side - CROP + 1) for side in image.shape[1:])
    return image[:, y : y + CROP, x : x + CROP]
