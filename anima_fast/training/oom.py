"""What a run gives up when memory runs out, so that the step can be repeated.

CUDA graphs are given up first. Policies, from the fastest to the smallest: recompute none, mlp
(fused blocks), block; then half of the blocks in host memory, then all but two. Every random number
of a micro-step follows from (seed, step, micro-step), so a repeated step is what the lower policy
would have computed from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.memory.offload import SaverSettings, install_block_runner

if TYPE_CHECKING:
    from anima_fast.options.training import MemoryOptions
    from anima_fast.training.run import Run


@dataclass(frozen=True)
class Policy:
    """How much is kept on the device between forward and backward."""

    recompute: str
    blocks_to_swap: int = 0

    @property
    def option(self) -> str:
        """The same as options of the command line."""
        swap = f" --blocks_to_swap {self.blocks_to_swap}" if self.blocks_to_swap else ""
        return f"--recompute {self.recompute}{swap}"


class MemoryPolicies:
    """What a run can still give up when memory runs out; `tell` gets a line for each thing."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self._run, self._tell = run, tell
        self._left = lower_policies(
            run.options,
            blocks=len(run.dit.blocks),
            fused=run.fused,
            can_swap=run.training.can_swap_later,
        )

    def lower(self) -> None:
        """Give up CUDA graphs, else go one policy down; then the step can be repeated.

        Raises:
            UserError: no policy is left, or weights were updated in backward.
        """
        run = self._run
        free_memory(run.device, keep_cached=False)
        if run.training.updates_in_backward:
            raise UserError(
                "out of memory, and --fused_backward_pass has changed weights already, so the step "
                "cannot be repeated: go on from the last state with --resume auto and --recompute "
                "block or more --blocks_to_swap"
            )
        if run.dit.graphs:
            run.dit.graphs.stop("memory ran out")
            given_up = "without CUDA graphs"
        else:
            given_up = f"with {self._lower_policy().option}"
        free_memory(run.device, keep_cached=False)
        self._tell(f"out of memory: this step is done again {given_up}, as are those to come")

    def _lower_policy(self) -> Policy:
        run = self._run
        if not self._left:
            more = "" if run.training.can_swap_later else " and more --blocks_to_swap"
            raise UserError(
                "out of memory at the lowest policy: close what else uses the card and go on with "
                f"--resume auto{more}, or start again with a smaller resolution or batch_size"
            )
        policy = self._left.pop(0)
        install_block_runner(
            run.dit,
            SaverSettings(policy.recompute, blocks_to_swap=policy.blocks_to_swap),
            device=run.device,
            fused=run.fused,
            sink=run.training.sink,
        )
        return policy


def lower_policies(
    options: MemoryOptions, *, blocks: int, fused: bool, can_swap: bool
) -> list[Policy]:
    """The policies below the one that a run with so many blocks starts with.

    Where block inputs are already kept in host memory only swapping is left, which replaces that.
    """
    swapped = options.blocks_to_swap or 0
    given = options.recompute or "none"
    names = ("none", "mlp", "block") if fused else ("none", "block")
    # A count of blocks is somewhere between none and block.
    below = names[names.index(given) + 1 :] if given in names else ("block",)
    most = max(blocks - 2, 0)
    counts = {min(blocks // 2, most), most} if can_swap else set()
    return [Policy(name, swapped) for name in below] + [
        Policy("block", count) for count in sorted(counts) if count > swapped
    ]


@contextlib.contextmanager
def one_line_out_of_memory() -> Iterator[None]:
    """Say in one line that memory ran out where nothing can be repeated: loading, the optimizer."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: close what else uses the card, or give --recompute block, more "
            "--blocks_to_swap or an 8-bit optimizer"
        ) from error
