"""The Qwen-Image VAE for still images, as the 2-D network that it is for one frame.

The published VAE is a causal video network. For one frame its 3x3x3 convolutions see zeros in all
but the last temporal slot, its temporal resampling never runs and its frame cache stays empty, so
the last temporal slice of every weight (`vae_checkpoint`) gives the same result.

    encode: image [B, 3, H, W] in [-1, 1] -> (posterior mean − mu) / s  [B, 16, H/8, W/8]
    decode: latents -> image, clamped to [-1, 1]

With `chunk_rows` the levels above 1/8 resolution run on strips of that many image rows (see
`vae_layers.run_stages`): the same result, without full-resolution maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anima_fast.models.vae_layers import Conv3x3, Head, Level, Middle, Upsample, run_stages

# Per-channel mean and standard deviation of the latents, as published with the model.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENT_CHANNELS = len(LATENT_MEAN)
# Pixels per latent position, on each side.
LATENT_SCALE = 8
MULTIPLIERS = (1, 2, 4, 4)


@dataclass(frozen=True)
class VaeConfig:
    """What differs between VAE files: `width` channels at full resolution, `latent` channels."""

    width: int = 96
    latent: int = LATENT_CHANNELS


class Encoder(nn.Module):
    """Image to the 2·latent channels of the posterior (mean, then log variance)."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in MULTIPLIERS]
        self.conv_in = Conv3x3(3, widths[0])
        self.levels = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)], width, 2, Conv3x3(width, width, stride=2) if i < 3 else None
            )
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1])
        self.head = Head(widths[-1], 2 * config.latent)

    def forward(self, image: Tensor, chunk_rows: int | None = None) -> Tensor:
        """[B, 3, H, W] to [B, 2Z, H/8, W/8]."""
        stages: list[tuple[nn.Module, int]] = [(self.conv_in, 1)]
        for i, level in enumerate(self.levels[:3]):
            stages += [(layer, 2**i) for layer in level.stages()]
        x = run_stages(stages, image, chunk_rows)
        for block in self.levels[3].blocks:
            x = block(x)
        return self.head(self.middle(x))


class Decoder(nn.Module):
    """Latents to the image."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(MULTIPLIERS)]
        # The upsampling before each level but the first has halved the channels.
        inputs = [widths[0], *(width // 2 for width in widths[:3])]
        self.conv_in = Conv3x3(config.latent, widths[0])
        self.middle = Middle(widths[0])
        self.levels = nn.ModuleList(
            Level(inputs[i], width, 3, Upsample(width) if i < 3 else None)
            for i, width in enumerate(widths)
        )
        self.head = Head(widths[-1], 3)

    def forward(self, z: Tensor, chunk_rows: int | None = None) -> Tensor:
        """[B, Z, h, w] to [B, 3, 8h, 8w]."""
        stages = []
        for i, level in enumerate(self.levels):
            stages += [(layer, LATENT_SCALE // 2**i) for layer in level.stages()]
        return run_stages([*stages, (self.head, 1)], self.middle(self.conv_in(z)), chunk_rows)


class VAE(nn.Module):
    """Encoder and decoder with the normalisation of the latents."""

    def __init__(self, config: VaeConfig | None = None) -> None:
        super().__init__()
        self.config = config or VaeConfig()
        latent = self.config.latent
        self.encoder = Encoder(self.config)
        self.to_moments = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.from_latents = nn.Conv2d(latent, latent, 1)
        self.decoder = Decoder(self.config)

    def encode(self, images: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Normalised posterior mean [B, 16, H/8, W/8], float32, on the VAE's device.

        images: [B, 3, H, W] in [-1, 1], any float dtype and device, H and W multiples of 8, else
        `ValueError`. chunk_rows: image rows per strip; None runs the image at once.
        """
        _check(images, 3, LATENT_SCALE, chunk_rows, "images")
        mean = self.moments(images, chunk_rows)[:, : self.config.latent].float()
        return (mean - _channels(LATENT_MEAN, mean)) / _channels(LATENT_STD, mean)

    def moments(self, images: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Mean and log variance [B, 2Z, H/8, W/8] before the normalisation, in the VAE's dtype."""
        weight = self.to_moments.weight
        # The only full-resolution copy held in full: it has three channels.
        return self.to_moments(self.encoder(images.to(weight.device, weight.dtype), chunk_rows))

    def decode(self, latents: Tensor, chunk_rows: int | None = None) -> Tensor:
        """Image [B, 3, 8h, 8w] of normalised latents [B, 16, h, w], float32 in [-1, 1].

        chunk_rows: image rows per strip; None runs the image at once.
        """
        _check(latents, self.config.latent, 1, chunk_rows, "latents")
        weight = self.from_latents.weight
        z = latents.to(weight.device, torch.float32)
        z = z * _channels(LATENT_STD, z) + _channels(LATENT_MEAN, z)
        image = self.decoder(self.from_latents(z.to(weight.dtype)), chunk_rows)
        return image.float().clamp(-1.0, 1.0)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _check(x: Tensor, channels: int, multiple: int, chunk_rows: int | None, name: str) -> None:
    if x.ndim != 4 or x.shape[1] != channels or any(n % multiple or not n for n in x.shape[2:]):
        raise ValueError(
            f"{name} are {tuple(x.shape)}, expected [B, {channels}, H, W] with H and W multiples "
            f"of {multiple}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}, expected a positive number of image rows")
