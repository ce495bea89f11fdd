"""How the DiT runs in training: kernels, recomputation, offloading, block swap, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anima_fast.device import uses_fused_blocks
from anima_fast.memory.offload import compile_blocks, install_block_runner
from anima_fast.memory.swap import Sink
from anima_fast.models.dit import AnimaDiT

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions, TrainOptions


def install_memory_savers(
    options: TrainOptions | FinetuneOptions,
    dit: AnimaDiT,
    device: torch.device,
    *,
    cuda_graphs: bool | None = False,
    sink: Sink | None = None,
) -> None:
    """Fused kernels, recomputation, offloading, block swap and per-block compilation.

    Args:
        options: of the run.
        dit: with its adapters attached, or with `requires_grad` on what is trained.
        device: where it computes.
        cuda_graphs: see `install_block_runner`.
        sink: gets the gradients of trained weights that are swapped.
    """
    install_block_runner(
        dit,
        device=device,
        fused=uses_fused_blocks(options.kernels, device, compiled=options.compile),
        recompute=options.recompute,
        gradient_checkpointing=options.gradient_checkpointing,
        cpu_offload=options.cpu_offload_checkpointing,
        unsloth_offload=options.unsloth_offload_checkpointing,
        blocks_to_swap=options.blocks_to_swap or 0,
        cuda_graphs=cuda_graphs,
        sink=sink,
    )
    if options.compile:
        compile_blocks(
            dit,
            backend=options.compile_backend,
            mode=options.compile_mode,
            dynamic=options.compile_dynamic,
            fullgraph=options.compile_fullgraph,
            cache_size_limit=options.compile_cache_size_limit,
        )
