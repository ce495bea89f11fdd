"""What can be refused before a run starts: device, attention backend, files, output folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anima_fast.device import (
    DTYPES,
    check_torch_version,
    set_backends,
    uses_fused_blocks,
)
from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.memory.offload import check_graphs, check_policies
from anima_fast.memory.swap import swapped_indices
from anima_fast.models.attention import check_attn_mode
from anima_fast.models.model_files import check_lora_files, check_model_files
from anima_fast.sampling.prompts import collect_prompts
from anima_fast.training.optimizers.names import find_optimizer

if TYPE_CHECKING:
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.options.run import TrainOptions


def check_start(options: TrainOptions, device: torch.device) -> DitConfig:
    """What can be refused before anything is encoded, and backend switches.

    Returns the sizes of the DiT.
    """
    check_torch_version()
    dtype = DTYPES[options.mixed_precision]
    check_attn_mode(options.attn_mode, training=True, device=device, dtype=dtype)
    fused = uses_fused_blocks(options.kernels, device, compiled=options.compile)
    dit = check_model_files(
        options.pretrained_model_name_or_path,
        options.qwen3,
        options.vae,
        options.llm_adapter_path,
    )
    if hasattr(options, "network_weights"):
        check_lora_files((options.network_weights, *options.base_weights))
    find_optimizer(options.optimizer_type)
    collect_prompts(options)
    swapped_indices(dit.num_blocks, options.blocks_to_swap or 0)
    check_policies(options.recompute or "none", dit.num_blocks, fused=fused)
    check_graphs(
        getattr(options, "cuda_graphs", False),
        fused=fused,
        moves=options.blocks_to_swap
        or options.cpu_offload_checkpointing
        or options.unsloth_offload_checkpointing,
    )
    if options.mixed_precision == "bf16" and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(
                "this card has no bfloat16 units: use --mixed_precision fp16 (the residual stream "
                "stays in fp32) or no"
            )
    check_output_folder(options)
    set_backends(tf32=options.cuda_allow_tf32, benchmark=options.cuda_cudnn_benchmark)
    return dit


def check_output_folder(options: TrainOptions) -> None:
    """Prove now, not after an hour, that the output folder can be written."""
    if not options.output_dir:
        raise UserError("--output_dir is required: the folder for files, log and states")
    check_folder(options.output_dir)
