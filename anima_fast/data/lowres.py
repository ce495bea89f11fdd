"""Low resolution at high noise: batches with σ ≥ T use a smaller picture.

At high noise only layout survives, which a smaller picture shows as well: at half the size it has a
quarter of the tokens, so those steps are cheaper. Detail is not trained in high-noise steps.
Trainers of large models do something similar in stages or by timestep (progressive growing,
"pyramidal flow matching", arXiv 2410.05954); here it is a threshold.

A batch has one size, so its samples must lie on one side of T. The first sample's σ is drawn from
the full distribution and decides; the others are drawn until they lie on its side. Every sample
then still has the full distribution: P(σ ∈ A) = Σ_side P(side)·P(σ ∈ A | side). σ is not shifted
for the smaller picture: the network receives σ and was trained at many sizes. `flux_shift` counts
the tokens of the full picture.

The noise level is drawn where the batch is loaded, from (seed, epoch, batch), so that only the
picture that is needed is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anima_fast.data.buckets import TOKEN_PIXELS, cover
from anima_fast.data.items import ImageItem
from anima_fast.data.seeding import seeded
from anima_fast.models.flow import FlowSettings, sample_sigma
from anima_fast.models.vae import LATENT_SCALE
from anima_fast.options.training import FlowOptions

# Below this many pixels on a side the full picture is used: there is little left to save.
LEAST_SIDE = 256
CANDIDATES = 4096


@dataclass(frozen=True)
class LowRes:
    """Threshold T, scale of the small pictures, and the distribution of σ."""

    sigma: float
    scale: float
    flow: FlowSettings

    @classmethod
    def from_options(cls, options: FlowOptions) -> LowRes | None:
        """None when the option is off."""
        if options.sigma_lowres is None:
            return None
        flow = FlowSettings.from_options(options)
        return cls(options.sigma_lowres, options.sigma_lowres_scale, flow)

    def small_item(self, item: ImageItem) -> ImageItem | None:
        """The item with a bucket of the smaller size; None where it would be too small."""
        width, height = (
            max(TOKEN_PIXELS, round(side * self.scale / TOKEN_PIXELS) * TOKEN_PIXELS)
            for side in item.bucket
        )
        if min(width, height) < LEAST_SIDE:
            return None
        return replace(item, bucket=(width, height), resized=cover(item.size, (width, height)))

    def draw(self, size: int, bucket: tuple[int, int], *key: object) -> tuple[Tensor, bool]:
        """σ of a batch [B = size] float32 on the CPU, and whether it is on the high side.

        `bucket` is that of the full picture, `key` what the draw depends on (seed, epoch, batch).
        """
        generator = torch.Generator().manual_seed(seeded("sigma", *key).getrandbits(63))
        latent_hw = (bucket[1] // LATENT_SCALE, bucket[0] // LATENT_SCALE)
        sigma = sample_sigma(self.flow, size, latent_hw, generator)
        high = bool(sigma[0] >= self.sigma)
        for i in range(1, size):
            if bool(sigma[i] >= self.sigma) == high:
                continue
            more = sample_sigma(self.flow, CANDIDATES, latent_hw, generator)
            fitting = more[(more >= self.sigma) == high]
            if not len(fitting):
                # A side this rare saves nothing: the batch takes the full picture.
                return sigma, False
            sigma[i] = fitting[0]
        return sigma, high

    def share(self, bucket: tuple[int, int]) -> float:
        """The share of the batches on the high side, from a hundred thousand draws."""
        generator = torch.Generator().manual_seed(0)
        latent_hw = (bucket[1] // LATENT_SCALE, bucket[0] // LATENT_SCALE)
        sigma = sample_sigma(self.flow, 100_000, latent_hw, generator)
        return (sigma >= self.sigma).float().mean().item()

    def describe(self, items: list[ImageItem]) -> list[str]:
        """What it will do to a dataset, in a line or two for the console."""
        pairs = [(item, self.small_item(item)) for item in items]
        fitting = [(item, small) for item, small in pairs if small is not None]
        lines = []
        if fitting:
            first, small = fitting[0]
            tokens = [_tokens(i.bucket) for i in (small, first)]
            lines.append(
                f"sigma_lowres: {self.share(first.bucket):.0%} of the batches are above sigma "
                f"{self.sigma:g} and have {tokens[0] / tokens[1]:.0%} of the tokens"
            )
        if len(fitting) < len(items):
            lines.append(
                f"sigma_lowres: {len(items) - len(fitting)} images would be smaller than "
                f"{LEAST_SIDE} pixels and keep their size"
            )
        return lines


def _tokens(bucket: tuple[int, int]) -> int:
    return (bucket[0] // TOKEN_PIXELS) * (bucket[1] // TOKEN_PIXELS)
