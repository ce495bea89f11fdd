"""Out of memory while training: the group of batches is done again, one policy lower.

CUDA graphs are given up first. Policies, from the fastest to the smallest: recompute none, mlp
(fused blocks), block; then half of the blocks in host memory, then all but two. Every random number
of a micro-step follows from (seed, step, micro-step), so what is done again is what the lower
policy would have done from the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from anima_fast.adapters.network import LoRANetwork
from anima_fast.errors import UserError
from anima_fast.memory.free import free_memory, is_out_of_memory
from anima_fast.memory.offload import install_block_runner
from anima_fast.models.flow import FlowSettings
from anima_fast.training.step import micro_step

if TYPE_CHECKING:
    from anima_fast.data.batches import Batch
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
    """The policy that a run is at, and the lower ones."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._left = lower_policies(run)

    def lower(self) -> Policy | None:
        """Go one policy down and return it; None when there is none."""
        if not self._left:
            return None
        policy = self._left.pop(0)
        run = self._run
        install_block_runner(
            run.dit,
            device=run.device,
            fused=run.fused,
            recompute=policy.recompute,
            blocks_to_swap=policy.blocks_to_swap,
            # Of full fine-tuning, whose swapped weights are trained.
            sink=getattr(run.network, "swapped_gradients", None),
        )
        free_memory(run.device, keep_cached=False)
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


def run_group(
    run: Run,
    batches: Sequence[Batch],
    settings: FlowSettings,
    policies: MemoryPolicies,
    *,
    step: int,
    tell: Callable[[str], None],
) -> list[tuple[Batch, Tensor]]:
    """Forward and backward of the micro-batches of one optimizer step; gradients add up.

    Args:
        run: the run.
        batches: the micro-batches.
        settings: of noise and loss.
        policies: where to go when memory is out.
        step: optimizer steps made before.
        tell: gets a line for each lowering.

    Returns:
        Each batch with its losses [B], detached.

    Raises:
        UserError: memory is out at the lowest policy, or weights were updated in backward.
    """
    bins = run.sigma_bins.copy()
    while True:
        try:
            return [
                (batch, backward(run, batch, settings, step=step, micro=micro))
                for micro, batch in enumerate(batches)
            ]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the frames that held the tensors of the failed attempt are gone.
        run.network.zero_grad_flat()
        run.sigma_bins.restore(bins)
        free_memory(run.device, keep_cached=False)
        if getattr(run.options, "fused_backward_pass", False):
            raise UserError(
                "out of memory, and --fused_backward_pass has changed weights already, so the step "
                "cannot be repeated: go on from the last state with --resume auto and --recompute "
                "block or more --blocks_to_swap"
            )
        if run.dit.graphs:
            run.dit.graphs.stop("memory ran out")
            free_memory(run.device, keep_cached=False)
            tell("out of memory: this step is done again without CUDA graphs, as are those to come")
            continue
        policy = policies.lower()
        if policy is None:
            more = "" if isinstance(run.network, LoRANetwork) else " and more --blocks_to_swap"
            raise UserError(
                "out of memory at the lowest policy: close what else uses the card and go on with "
                f"--resume auto{more}, or start anew with a smaller resolution or batch_size"
            )
        tell(f"out of memory: this step is done again with {policy.option}, as are those to come")


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


def backward(run: Run, batch: Batch, settings: FlowSettings, *, step: int, micro: int) -> Tensor:
    """One micro-batch: its losses [B], with the gradients added to the buffer."""
    losses = micro_step(run, batch, settings, step=step, micro=micro)
    # Module dropout may have left out everything that is trained: then the gradient is zero.
    if losses.requires_grad:
        run.scaler.scale(losses.mean() / run.length.accumulation).backward()
    return losses.detach()
