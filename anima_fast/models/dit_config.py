"""Sizes of a DiT, read from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anima_fast.errors import UserError
from anima_fast.models.dit_layers import PATCH


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
        """Read every size from the shapes of a state dict without prefix.

        Raises `UserError` when a tensor that tells a size is missing or impossible.
        """
        blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
        channels, patch_in = _size(shapes, "x_embedder.proj.1.weight")
        head_dim = _size(shapes, "blocks.0.self_attn.q_norm.weight")[0]
        if head_dim % 2 or head_dim < 12 or channels % head_dim or patch_in % 4 or patch_in < 8:
            raise UserError(
                f"{channels} channels, heads of {head_dim} and patches of {patch_in} are the sizes "
                "of no DiT"
            )
        return cls(
            model_channels=channels,
            num_blocks=len(blocks),
            num_heads=channels // head_dim,
            head_dim=head_dim,
            context_dim=_size(shapes, "blocks.0.cross_attn.k_proj.weight")[1],
            adaln_rank=_size(shapes, "blocks.0.adaln_modulation_self_attn.1.weight")[0],
            mlp_hidden=_size(shapes, "blocks.0.mlp.layer1.weight")[0],
            in_channels=patch_in // PATCH**2 - 1,
            out_channels=_size(shapes, "final_layer.linear.weight")[0] // PATCH**2,
        )


# The published model.
PUBLISHED = DitConfig(
    model_channels=2048, num_blocks=28, num_heads=16, head_dim=128, context_dim=1024,
    adaln_rank=256, mlp_hidden=8192,
)  # fmt: skip


def _size(shapes: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    """Shape of a tensor that tells a size, checked to be one that can."""
    if name not in shapes:
        raise UserError(f"the tensor {name} is missing")
    shape = shapes[name]
    if len(shape) != (1 if name.endswith("norm.weight") else 2) or min(shape) < 1:
        raise UserError(f"the tensor {name} has the impossible shape {list(shape)}")
    return shape
