"""The layers of the DiT: norms, modulation, embeddings, attention, MLP.

Dtypes: linear layers in the dtype of their weights; norm statistics and modulation in at least
float32, rounded once to the activation dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.kernels.op import wide
from anima_fast.models.attention import ZeroRows, attention
from anima_fast.models.rope import apply_rope

EPS = 1e-6
PATCH = 2
# A weight whose largest entry is smaller is scaled for float16.
LEAST = 2.0**-6


@dataclass(frozen=True)
class Modulation:
    """The AdaLN vectors of one branch, each [B, 1, D]; the final layer has no gate."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True)
class Shared:
    """What all blocks of one forward read besides the tokens."""

    embedding: Tensor  # [B, 1, D]
    shared_modulation: Tensor  # [B, 1, 3 D]
    context: Tensor  # [B, S, C]
    cos: Tensor  # [L, K]
    sin: Tensor  # [L, K]
    zero_rows: ZeroRows | None
    # Dtype of the linear layers in attention and MLP.
    dtype: torch.dtype
    attn_mode: str = "torch"
    split_attn: bool = False
    # The modulation of all blocks, [blocks, B, 9, D], when they run fused (models/modulation.py).
    modulations: Tensor | None = None


def layernorm_modulate(x: Tensor, modulation: Modulation, dtype: torch.dtype) -> Tensor:
    """LN(x)·(1 + scale) + shift, computed wide and rounded once to `dtype`."""
    normed = F.layer_norm(wide(x), x.shape[-1:], eps=EPS)
    return (normed * (1 + wide(modulation.scale)) + wide(modulation.shift)).to(dtype)


def timestep_features(sigma: Tensor, channels: int) -> Tensor:
    """[cos(σ f), sin(σ f)], f_j = 10000^(−j/half): [B] → [B, channels] in at least float32."""
    half = channels // 2
    sigma = wide(sigma)
    exponents = torch.arange(half, device=sigma.device, dtype=sigma.dtype) / half
    angles = sigma[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, rounded once to x's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] → the same shape and dtype."""
        x_wide = wide(x)
        rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + EPS)
        return (x_wide * rstd * self.weight).to(x.dtype)


class Linear(nn.Linear):
    """A product without bias, whose weight may be stored divided by a power of two.

    float16 is too narrow for some weights: entries from 2⁻⁶ to 1 keep their digits, and a sum of a
    few products of them stays in its range. Where the largest is elsewhere, `hold` brings it there.
    Whoever reads `weight` multiplies with `weight_scale`.
    """

    weight_scale = 1.0

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        y = super().forward(x)
        return y if self.weight_scale == 1.0 else y * self.weight_scale

    def hold(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight as it is stored in `dtype`; sets `weight_scale`."""
        if weight.element_size() == 1:
            # PyTorch computes nothing in 8 bit; float16 holds all such values.
            weight = weight.half()
        self.weight_scale = scale_for(weight) if dtype == torch.float16 else 1.0
        return (
            (weight / self.weight_scale).to(dtype) if self.weight_scale != 1.0 else weight.to(dtype)
        )


def scale_for(weight: Tensor) -> float:
    """The power of two that a weight is divided by to be stored in float16; 1 without values."""
    if weight.is_meta:
        return 1.0
    largest = weight.abs().amax().item()
    if not math.isfinite(largest) or not largest or LEAST <= largest <= 1:
        return 1.0
    # The largest entry comes to lie in [1/2, 1).
    return 2.0 ** math.frexp(largest)[1]


def share_scale(layers: Sequence[Linear]) -> None:
    """Give layers that are computed as one product one scale: the largest."""
    largest = max(layer.weight_scale for layer in layers)
    for layer in layers:
        if layer.weight_scale != largest:
            layer.weight.data = layer.weight.data * (layer.weight_scale / largest)
            layer.weight_scale = largest


class PatchEmbed(nn.Module):
    """2x2 patches of latents and mask → tokens, features in (channel, row, column) order."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        features = (in_channels + 1) * PATCH**2
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(features, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C + 1, H, W] → [B, (H/2)(W/2), D]."""
        patches = F.pixel_unshuffle(x, PATCH)  # [B, (C + 1)·4, H/2, W/2]
        return self.proj(patches.flatten(2).transpose(1, 2))


class TimestepEmbedding(nn.Module):
    """W2 silu(W1 s): the vector that every AdaLN of the model adds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, channels, bias=False)
        self.linear_2 = nn.Linear(channels, 3 * channels, bias=False)

    def forward(self, s: Tensor) -> Tensor:
        """[B, D] → [B, 3 D]."""
        return self.linear_2(F.silu(self.linear_1(s)))


class AdaLN(nn.Sequential):
    """B A silu(e): the low-rank part of one branch's modulation."""

    def __init__(self, channels: int, rank: int, outputs: int) -> None:
        down, up = nn.Linear(channels, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        super().__init__(nn.SiLU(), down, up)


class Attention(nn.Module):
    """Projections of multi-head attention with normed queries and keys."""

    def __init__(self, channels: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(context_dim, channels)
        self.v_proj = Linear(context_dim, channels)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.output_proj = Linear(channels, channels)

    def heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x [B, L, D], k and v of context [B, S, C], each as heads [B, ., H, K]."""
        split = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, split))  # [B, L, H, K]
        k = self.k_norm(self.k_proj(context).unflatten(-1, split))  # [B, S, H, K]
        v = self.v_proj(context).unflatten(-1, split)  # [B, S, H, K]
        return q, k, v


class SelfAttention(Attention):
    """Image tokens attend to each other, with RoPE."""

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        q, k, v = self.heads(x, x)
        q, k = apply_rope(q, shared.cos, shared.sin), apply_rope(k, shared.cos, shared.sin)
        out = attention(q, k, v, mode=shared.attn_mode, split=shared.split_attn)
        return self.output_proj(out.flatten(2))


class CrossAttention(Attention):
    """Image tokens attend to the text rows and their zero rows, without RoPE or mask."""

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        q, k, v = self.heads(x, shared.context)
        rows, mode = shared.zero_rows, shared.attn_mode
        out = attention(q, k, v, zero_keys=rows, mode=mode, split=shared.split_attn)
        return self.output_proj(out.flatten(2))


class Mlp(nn.Module):
    """layer2(gelu(layer1(x))), exact GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = Linear(channels, hidden)
        self.layer2 = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        return self.layer2(F.gelu(self.layer1(x)))


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, channels: int, rank: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, out_channels * PATCH**2, bias=False)
        self.adaln_modulation = AdaLN(channels, rank, 2 * channels)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, 4 C], features in (row, column, channel) order."""
        vectors = self.adaln_modulation(shared.embedding)  # [B, 1, 2 D]
        vectors = vectors + shared.shared_modulation[..., : vectors.shape[-1]]
        modulation = Modulation(*vectors.chunk(2, -1))
        return self.linear(layernorm_modulate(x, modulation, self.linear.weight.dtype))


def weight_scale(layer: nn.Module) -> float:
    """What the stored weight of a layer is multiplied with: `Linear.weight_scale`, else 1."""
    return getattr(layer, "weight_scale", 1.0)


def attached(layer: nn.Module) -> Sequence[Any]:
    """The adapters on a layer (adapters/layers.py puts them there); () without one."""
    return getattr(layer, "adapters", ())
