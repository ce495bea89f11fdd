"""How much of a block is computed again in backward, by name."""

from __future__ import annotations

POLICIES = ("none", "mlp", "block")


def block_policies(recompute: str | int, blocks: int) -> list[str]:
    """The policy of every block: none, mlp or block for all, or how many blocks at `block`.

    Raises `ValueError` for anything else.
    """
    if recompute in POLICIES:
        return [str(recompute)] * blocks
    count = int(recompute) if str(recompute).isdigit() else -1
    if not 0 <= count <= blocks:
        raise ValueError(
            f"recompute is {recompute!r}, expected none, mlp, block or a count from 0 to {blocks}"
        )
    return ["block"] * count + ["none"] * (blocks - count)
