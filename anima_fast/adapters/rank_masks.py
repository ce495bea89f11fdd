"""T-LoRA: fewer ranks at higher noise.

    r(σ) = ⌊(1 − σ)^α · (R − r_min)⌋ + r_min,    rank components r(σ) … R − 1 are masked

High noise decides layout, and a LoRA of a few pictures learns their layouts by heart there; with
few ranks it cannot. The mask acts in training only: loaders use all ranks at every noise level, as
they do with any LoRA, and the file is an ordinary one. Source: Soboleva et al., "T-LoRA: Single
Image Diffusion Model Customization Without Overfitting", arXiv 2507.05964, with σ for its t / T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_mask(sigma: Tensor, rank: int, min_rank: int, alpha: float = 1.0) -> Tensor:
    """Which rank components each sample may use.

    Args:
        sigma: [B] in 0 … 1.
        rank: R; `min_rank` is at most that many.
        min_rank, alpha: r_min and α.

    Returns:
        [B, R] float32 of 0 and 1.
    """
    least = min(min_rank, rank)
    share = (1 - sigma.double()).clamp(0, 1) ** alpha
    ranks = (share * (rank - least)).floor() + least  # [B]
    index = torch.arange(rank, device=sigma.device)
    return (index < ranks[:, None]).float()
