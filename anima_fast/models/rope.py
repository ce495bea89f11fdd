"""Rotary position embedding in the half layout: element j turns with element j + K/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(
    head_dim: int, frames: int, height: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """RoPE angles of all tokens in (t, h, w) order.

    The axes share the head dimension as d_h = d_w = 2⌊K/6⌋ and d_t = K − 2 d_h; θ = 10000, for h
    and w times 4^(d/(d−2)) (NTK extrapolation by 4).

    Returns:
        [frames·height·width, K] float32, the K/2 angles twice.
    """
    d_h = 2 * (head_dim // 6)
    d_t = head_dim - 2 * d_h
    parts = []
    for axis, (length, d, ratio) in enumerate(
        ((frames, d_t, 1.0), (height, d_h, 4.0), (width, d_h, 4.0))
    ):
        theta = 10000.0 * ratio ** (d / (d - 2))
        frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).float()
        shape = [1, 1, 1, d // 2]
        shape[axis] = length
        parts.append(angles.view(shape).expand(frames, height, width, -1))
    half = torch.cat(parts, -1).reshape(frames * height * width, head_dim // 2)
    return torch.cat([half, half], -1).to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin; x [B, L, H, K], cos and sin [L, K] in x's dtype."""
    first, second = x.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return x * cos[:, None] + rotated * sin[:, None]


def sequence_angles(
    head_dim: int, length: int, theta: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Angles of a plain sequence: position · θ^(−2j/K), [length, K] float32, the K/2 twice."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), 1 / theta**exponents)
    return torch.cat([angles, angles], -1)
