"""Rotary position embedding in the half layout: element j turns with element j + K/2."""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0
# NTK extrapolation ratios of the axes (t, h, w).
RATIOS = (1.0, 4.0, 4.0)


def rope_angles(
    head_dim: int, frames: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """RoPE angles of all tokens in (t, h, w) order: [frames·height·width, K] float32.

    The K/2 angles come twice. The axes share the head dimension as d_h = d_w = 2⌊K/6⌋ and
    d_t = K − 2 d_h; θ = 10000, times 4^(d/(d−2)) for h and w.
    """
    d_h = 2 * (head_dim // 6)
    lengths, sizes = (frames, height, width), (head_dim - 2 * d_h, d_h, d_h)
    parts = []
    for axis, (length, d, ratio) in enumerate(zip(lengths, sizes, RATIOS, strict=True)):
        theta = THETA * ratio ** (d / (d - 2))
        # float64 here: the float32 angles are then the rounded exact ones on every device.
        exponents = torch.arange(0, d, 2, dtype=torch.float64, device=device) / d
        positions = torch.arange(length, dtype=torch.float64, device=device)
        angles = torch.outer(positions, theta**-exponents).float()  # [length, d/2]
        shape = [1, 1, 1, d // 2]
        shape[axis] = length
        parts.append(angles.view(shape).expand(*lengths, -1))
    half = torch.cat(parts, -1).flatten(0, 2)
    return torch.cat([half, half], -1)


def sequence_angles(head_dim: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles of a plain sequence: position · 10000^(−2j/K), [length, K] float32, the K/2 twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    half = torch.outer(positions, THETA**-exponents)
    return torch.cat([half, half], -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin; x [B, L, H, K], cos and sin [L, K] in x's dtype."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return x * cos[:, None] + rotated * sin[:, None]
