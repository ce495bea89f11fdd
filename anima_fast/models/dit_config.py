"""Sizes of a DiT, read from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import count_blocks, size_of
from anima_fast.models.dit_layers import PATCH

# The DiT attends to at least this many text rows: real ones, then zeros.
TEXT_ROWS = 512


@dataclass(frozen=True)
class DitConfig:
    """Sizes of a DiT; the last two are 16 in every Anima file."""

    model_channels: int
    num_blocks: int
    num_heads: int
    head_dim: int
    context_dim: int
    adaln_rank: int
    mlp_hidden: int
    in_channels: int = 16
    out_channels: int = 16

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]]) -> DitConfig:
        """Read every size from the shapes of a state dict without prefix; raises as `size_of`."""
        channels, patch_in = size_of(shapes, "x_embedder.proj.1.weight")
        head_dim = size_of(shapes, "blocks.0.self_attn.q_norm.weight")[0]
        if head_dim % 2 or head_dim < 12 or channels % head_dim or patch_in % 4 or patch_in < 8:
            raise UserError(
                f"{channels} channels, heads of {head_dim} and patches of {patch_in} are not the "
                "sizes of any DiT"
            )
        return cls(
            model_channels=channels,
            num_blocks=count_blocks(shapes),
            num_heads=channels // head_dim,
            head_dim=head_dim,
            context_dim=size_of(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
            adaln_rank=size_of(shapes, "blocks.0.adaln_modulation_self_attn.1.weight")[0],
            mlp_hidden=size_of(shapes, "blocks.0.mlp.layer1.weight")[0],
            in_channels=patch_in // PATCH**2 - 1,
            out_channels=size_of(shapes, "final_layer.linear.weight")[0] // PATCH**2,
        )


# The published model.
PUBLISHED = DitConfig(
    model_channels=2048, num_blocks=28, num_heads=16, head_dim=128, context_dim=1024,
    adaln_rank=256, mlp_hidden=8192,
)  # fmt: skip
