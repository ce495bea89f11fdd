"""Recomputation in backward: how much of a block, by name, and how to do it for one block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from anima_fast.models.dit_layers import Shared

POLICIES = ("none", "mlp", "block")


def block_policies(recompute: str | int | list[str], blocks: int) -> list[str]:
    """The policy of every block: none, mlp or block for all, or how many blocks at `block`.

    A list is that of all blocks already. Raises `ValueError` for anything else.
    """
    if isinstance(recompute, list):
        return recompute
    if recompute in POLICIES:
        return [str(recompute)] * blocks
    count = int(recompute) if str(recompute).isdigit() else -1
    if not 0 <= count <= blocks:
        raise ValueError(
            f"recompute is {recompute!r}, expected none, mlp, block or a count from 0 to {blocks}"
        )
    return ["block"] * count + ["none"] * (blocks - count)


def recomputed(
    run: Callable[[Tensor, Shared], Tensor],
    x: Tensor,
    shared: Shared,
    pack: Callable[[Tensor], Any] | None = None,
    unpack: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """run(x, shared), of which x is kept, as `pack` stores it; backward repeats the rest."""
    # Imported lazily: the options read POLICIES, and --help should not load torch.
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.checkpoint import checkpoint

    # The hooks see one tensor only, the input that checkpoint keeps: inside the block its own
    # hooks are in force.
    with nullcontext() if pack is None else saved_tensors_hooks(pack, unpack):
        return checkpoint(run, x, shared, use_reentrant=False, preserve_rng_state=True)
