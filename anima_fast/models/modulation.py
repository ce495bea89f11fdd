"""The AdaLN vectors of all blocks at once: two batched products a step instead of six a block.

    z = silu(e) [A₁; A₂; …]ᵀ      m_i = z_i B_iᵀ + a        i over the three AdaLN of every block

The weights are in two packed buffers of which the layers' own weights are views (`pack`), so the
state dict is unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.kernels.products import stacked
from anima_fast.models.dit import Block
from anima_fast.models.dit_layers import attached

BRANCHES = ("adaln_modulation_self_attn", "adaln_modulation_cross_attn", "adaln_modulation_mlp")


def pack(layers: Sequence[nn.Module]) -> None:
    """Put the weights of layers one after another in memory, as views of one buffer."""
    buffer = torch.cat([layer.weight.data for layer in layers])
    first = 0
    for layer in layers:
        layer.weight.data = buffer[first : first + len(layer.weight)]
        first += len(layer.weight)


def adaln_layers(blocks: Sequence[Block]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The down and the up layers of all AdaLN, block by block."""
    branches = [getattr(block, name) for block in blocks for name in BRANCHES]
    return [branch[1] for branch in branches], [branch[2] for branch in branches]


def batched_modulation(
    blocks: Sequence[Block], embedding: Tensor, shared_modulation: Tensor
) -> Tensor:
    """Shift, scale, gate of all sublayers, [blocks, B, 9, D], of e [B, 1, D] and a [B, 1, 3 D]."""
    downs, ups = adaln_layers(blocks)
    rank, width = downs[0].weight.shape
    x = F.silu(embedding[:, 0])  # [B, D]
    z = (x @ stacked([layer.weight for layer in downs]).T).view(len(x), -1, rank)
    z = _with_deltas(z.transpose(0, 1), downs, [x] * len(downs))  # [3 n, B, rank]
    b = stacked([layer.weight for layer in ups]).view(len(ups), -1, rank)  # [3 n, 3 D, rank]
    m = _with_deltas(torch.bmm(z, b.transpose(1, 2)), ups, z)  # [3 n, B, 3 D]
    m = m + shared_modulation[:, 0]
    m = m.view(len(blocks), 3, len(x), 3, width)
    return m.transpose(1, 2).flatten(2, 3)


def _with_deltas(y: Tensor, layers: Sequence[nn.Linear], x: Sequence[Tensor]) -> Tensor:
    """`y` [layers, B, N] and what the layers' adapters add to it."""
    if not any(attached(layer) for layer in layers):
        return y
    parts = []
    for part, layer, value in zip(y, layers, x, strict=True):
        for adapter in attached(layer):
            part = part + adapter.delta(value, adapter.multiplier)
        parts.append(part)
    return torch.stack(parts)
