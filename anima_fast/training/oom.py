"""Out of memory while training: the group of batches is done again, one policy lower.

CUDA graphs are given up first. Policies, from the fastest to the smallest: recompute none, mlp
(fused blocks), block; then half of the blocks in host memory, then all but two. Every random number
of a micro-step follows from (seed, step, micro-step), so what is done again is what the lower
policy would have done from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anima_fast.adapters.network import LoRANetwork
from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.memory.offload import install_block_runner

if TYPE_CHECKING:
    from anima_fast.training.run import Run


@dataclass(frozen=True)
class Policy:
    """How much is kept on the device between forward and backward."""

    recompute: str
    blocks_to_swap: int = 0

    @property
    def option(self) -> str:
        """The options that mean it."""
        swap = f" --blocks_to_swap {self.blocks_to_swap}" if self.blocks_to_swap else ""
        return f"--recompute {self.recompute}{swap}"


class MemoryPolicies:
    """What a run can still give up when memory runs out.

    Args:
        run: the run.
        tell: gets a line for each thing given up.
    """

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        self._run, self._tell = run, tell
        self._left = lower_policies(run)

    def lower(self) -> None:
        """Give up CUDA graphs, else go one policy down; the step can then be done again.

        Raises:
            UserError: there is none below, or weights were updated in backward.
        """
        run = self._run
        free_memory(run.device, keep_cached=False)
        if getattr(run.options, "fused_backward_pass", False):
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
            more = "" if isinstance(run.network, LoRANetwork) else " and more --blocks_to_swap"
            raise UserError(
                "out of memory at the lowest policy: close what else uses the card and go on with "
                f"--resume auto{more}, or start anew with a smaller resolution or batch_size"
            )
        policy = self._left.pop(0)
        install_block_runner(
            run.dit,
            device=run.device,
            fused=run.fused,
            recompute=policy.recompute,
            blocks_to_swap=policy.blocks_to_swap,
            # Of full fine-tuning, whose swapped weights are trained.
            sink=getattr(run.network, "swapped_gradients", None),
        )
        return policy


def lower_policies(run: Run) -> list[Policy]:
    """What is below the options of a run.

    Trained weights and compiled blocks are not swapped, and where block inputs wait in host memory
    already only swapping is left, which takes its place.
    """
    options, blocks = run.options, len(run.dit.blocks)
    offloads = options.cpu_offload_checkpointing or options.unsloth_offload_checkpointing
    given = "block" if options.gradient_checkpointing or offloads else options.recompute or "none"
    names = ("none", "mlp", "block") if run.fused else ("none", "block")
    # A count of blocks is somewhere between none and block.
    below = names[names.index(given) + 1 :] if given in names else ("block",)
    policies = [Policy(name, options.blocks_to_swap or 0) for name in below]
    swaps = isinstance(run.network, LoRANetwork) and not options.compile
    most = max(blocks - 2, 0)
    counts = {min(blocks // 2, most), most} if swaps else set()
    more = sorted(count for count in counts if count > (options.blocks_to_swap or 0))
    return policies + [Policy("block", count) for count in more]


@contextlib.contextmanager
def one_line_out_of_memory() -> Iterator[None]:
    """Memory that is out where nothing can be done again: loading, the optimizer."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: close what else uses the card, or give --recompute block, more "
            "--blocks_to_swap or an 8-bit optimizer"
        ) from error
