"""Running the DiT's blocks in less memory: recomputation, host copies, block swap; compiling them.

Each is a way to run one block, installed as `dit.block_runner`:

- gradient checkpointing keeps a block's input and recomputes the block in backward, with the same
  random numbers (dropout);
- with offloading that input waits in host memory: plainly, or pinned and copied asynchronously;
- block swap keeps the weights of some blocks in host memory (memory/swap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.device import uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.memory.swap import BlockSwap, Sink, swapped_indices
from anima_fast.models.dit import AnimaDiT, Block
from anima_fast.models.dit_layers import Shared
from anima_fast.models.recompute import block_policies, recomputed

if TYPE_CHECKING:
    from anima_fast.models.block_graphs import BlockGraphs
    from anima_fast.options.training import MemoryOptions

# A tensor in host memory and the device that it came from.
Packed = tuple[torch.device, Tensor]


@dataclass(frozen=True)
class SaverSettings:
    """How the blocks of a DiT run in less memory; without any of these they run plainly.

    Attributes:
        recompute: none, mlp (fused only), block, or a count of blocks at `block`.
        offload: where the input of a recomputed block waits: "" (on the device), host, or pinned
            (in pinned host memory, with asynchronous copies).
        blocks_to_swap: how many blocks keep their weights in host memory, at most two less than
            there are; spread evenly, so that copies overlap the computation between them.
        cuda_graphs: launch the fused blocks as graphs (models/block_graphs.py); None: on a card,
            where that pays.
    """

    recompute: str | int = "none"
    offload: str = ""
    blocks_to_swap: int = 0
    cuda_graphs: bool | None = False

    @classmethod
    def of(cls, options: MemoryOptions, cuda_graphs: bool | None = False) -> SaverSettings:
        """Those of a run, whose rules have made checkpointing and offloading `recompute` block."""
        pinned, host = options.unsloth_offload_checkpointing, options.cpu_offload_checkpointing
        offload = "pinned" if pinned else "host" if host else ""
        return cls(options.recompute or "none", offload, options.blocks_to_swap or 0, cuda_graphs)

    def policies(self, blocks: int, *, fused: bool) -> list[str]:
        """The recompute policy of every block; `UserError` for what this DiT cannot run."""
        if self.cuda_graphs and (not fused or self.offload or self.blocks_to_swap):
            raise UserError(
                "--cuda_graphs needs the fused blocks on a CUDA card, without --kernels eager, "
                "--compile, --blocks_to_swap and offloaded checkpointing: leave it out, or those"
            )
        swapped_indices(blocks, self.blocks_to_swap)
        try:
            policies = block_policies(self.recompute, blocks)
        except ValueError as error:
            raise UserError(f"--recompute: {error}") from None
        if "mlp" in policies and not fused:
            raise UserError(
                "--recompute mlp is a policy of the fused block: use --kernels triton on a CUDA "
                "card, or --recompute block"
            )
        return policies


PLAIN = SaverSettings()


def install_memory_savers(
    options: MemoryOptions,
    dit: AnimaDiT,
    device: torch.device,
    *,
    cuda_graphs: bool | None = False,
    sink: Sink | None = None,
) -> None:
    """`install_block_runner` and `compile_blocks` as the options of a run say."""
    fused = uses_fused_blocks(options.kernels, device, compiled=options.compile)
    settings = SaverSettings.of(options, cuda_graphs)
    install_block_runner(dit, settings, fused=fused, device=device, sink=sink)
    if options.compile:
        compile_blocks(
            dit,
            backend=options.compile_backend,
            mode=options.compile_mode,
            dynamic=options.compile_dynamic,
            fullgraph=options.compile_fullgraph,
            cache_size_limit=options.compile_cache_size_limit,
        )


def install_block_runner(
    dit: AnimaDiT,
    settings: SaverSettings = PLAIN,
    *,
    fused: bool = False,
    device: torch.device | str | None = None,
    sink: Sink | None = None,
) -> None:
    """Choose how `dit` runs its blocks; results are the same in every mode.

    Call it when the DiT's adapters are attached (`requires_grad` decides which weights are
    swapped). A DiT that is loaded on the CPU goes to the device here, all but its swapped weights,
    so that a card too small for the DiT is never asked to hold all of it. A later
    `dit.to(device)` would move them there.

    Args:
        dit, settings: the model, and what it saves.
        fused: run blocks through the fused kernels (models/block.py).
        device: where the DiT computes; None means where it is.
        sink: gets the gradients of swapped blocks' trained weights (memory/swap.py); without it
            only frozen weights are swapped.

    Raises `UserError` for what this DiT cannot run, and for no frozen weights to swap.
    """
    policies = settings.policies(len(dit.blocks), fused=fused)
    device = torch.device(device) if device is not None else next(dit.parameters()).device
    swap = None
    if settings.blocks_to_swap:
        swap = BlockSwap(dit.blocks, settings.blocks_to_swap, device, fused=fused, sink=sink)
    move_to(dit, device, leave=swap.weights if swap else ())
    offload = {"host": to_host, "pinned": to_pinned}.get(settings.offload)
    dit.run_eagerly()
    if fused:
        # Not at the top: triton is not on every system that runs the eager blocks.
        from anima_fast.models.fuse import fuse_blocks

        moves = offload is not None or swap is not None
        dit.graphs = graphs_of(settings.cuda_graphs, device, moves=moves)
        fuse_blocks(dit, policies, swapped=swap.order if swap else ())
        if offload is not None:
            for block in dit.blocks:
                block.fused.pack, block.fused.unpack = offload, to_device
        # The fused block computes again by itself.
        policies = ["none"] * len(dit.blocks)
    if swap is not None or set(policies) != {"none"}:
        dit.block_runner = BlockRunner(policies, offload=offload, swap=swap)


def graphs_of(
    cuda_graphs: bool | None, device: torch.device, *, moves: object
) -> BlockGraphs | None:
    """What launches fused blocks as graphs: always, never, or (None) on a card where it pays."""
    if cuda_graphs is None:
        cuda_graphs = False if moves or device.type != "cuda" else None
    if cuda_graphs is False:
        return None
    # Not at the top: triton is not on every system that runs the eager blocks.
    from anima_fast.models.block_graphs import BlockGraphs

    return BlockGraphs(always=bool(cuda_graphs))


class BlockRunner:
    """Runs a block of the DiT: `runner(index, block, x, shared) -> x`."""

    def __init__(
        self,
        policies: Sequence[str],
        *,
        offload: Callable[[Tensor], Packed] | None = None,
        swap: BlockSwap | None = None,
    ) -> None:
        self.policies = policies
        self.offload = offload
        self.swap = swap

    def __call__(self, index: int, block: Block, x: Tensor, shared: Shared) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        run: Callable[[Tensor, Shared], Tensor] = block
        recompute = self.policies[index] == "block"
        if self.swap is not None and index in self.swap:
            run, recompute = self.swap.runner(index, block), True
        if not (recompute and torch.is_grad_enabled()):
            return run(x, shared)
        return recomputed(run, x, shared, self.offload, to_device)


def to_host(x: Tensor) -> Packed:
    """A copy in host memory, complete when the call returns."""
    return x.device, x.to("cpu", copy=True)


def to_pinned(x: Tensor) -> Packed:
    """A copy in pinned host memory, made in stream order without waiting for it."""
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return x.device, host.copy_(x, non_blocking=True)


def to_device(packed: Packed) -> Tensor:
    """The tensor back on its device, in stream order."""
    device, host = packed
    return host.to(device, non_blocking=True)


def move_to(module: nn.Module, device: torch.device, *, leave: Iterable[Tensor]) -> None:
    """Move all parameters and buffers to a device, except those in `leave`."""
    left = {id(tensor) for tensor in leave}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in left:
            tensor.data = tensor.data.to(device)


def compile_blocks(
    dit: AnimaDiT,
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | str | None = None,
    fullgraph: bool = False,
    cache_size_limit: int | None = None,
) -> None:
    """torch.compile each block in place; swapped blocks stay as they are.

    Args:
        dit: the model, after `install_block_runner`.
        backend, mode: of dynamo, and inductor's mode; None or "default" for its default.
        dynamic: true, false or auto (also None): whether shapes are compiled as unknowns.
        fullgraph: refuse graph breaks.
        cache_size_limit: how many variants (image sizes, caption lengths) are kept.

    Raises `UserError` for an unknown backend or `dynamic`, or a mode that the backend lacks.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"--compile_backend {backend} is unknown: use one of {', '.join(known)}")
    choices = {"true": True, "false": False, "auto": None, "none": None}
    if str(dynamic).lower() not in choices:
        raise UserError(f"--compile_dynamic {dynamic} is unknown: use true, false or auto")
    if cache_size_limit is not None:
        torch._dynamo.config.cache_size_limit = cache_size_limit
    options = {"mode": mode} if mode not in (None, "default") else {}
    if options and backend != "inductor":
        raise UserError(f"--compile_mode {mode} needs --compile_backend inductor")
    runner = dit.block_runner
    swap = runner.swap if isinstance(runner, BlockRunner) else None
    for index, block in enumerate(dit.blocks):
        if swap is None or index not in swap:
            block.compile(
                backend=backend,
                dynamic=choices[str(dynamic).lower()],
                fullgraph=fullgraph,
                **options,
            )
