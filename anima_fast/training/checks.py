"""What can be refused before a run starts: device, attention backend, files, output folder."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.memory.offload import check_graphs, check_policies
from anima_fast.memory.swap import swapped_indices
from anima_fast.models.attention import check_attn_mode, check_torch_version, check_triton
from anima_fast.models.model_files import check_lora_files, check_model_files
from anima_fast.prompts import collect_prompts
from anima_fast.training.optimizer_names import find_optimizer

if TYPE_CHECKING:
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.options import SampleOptions, TrainOptions

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(options: TrainOptions | SampleOptions) -> torch.device:
    """The device asked for, else CUDA where there is a card, else the CPU."""
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device cuda needs a CUDA card and a CUDA build of PyTorch; this PyTorch sees none "
            "(`anima-fast doctor` says what is missing), or use --device cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device that PyTorch knows: cuda, cpu") from None
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"--device {name}: there are {torch.cuda.device_count()} cards, counted from cuda:0"
            )
        # Triton launches on the current card, whatever card its tensors are on.
        torch.cuda.set_device(device)
    return device


def check_start(options: TrainOptions, device: torch.device) -> DitConfig:
    """What can be refused before anything is encoded, and backend switches.

    Returns the sizes of the DiT.
    """
    check_torch_version()
    dtype = DTYPES[options.mixed_precision]
    check_attn_mode(options.attn_mode, training=True, device=device, dtype=dtype)
    fused = uses_fused_blocks(options, device)
    dit = check_model_files(options)
    if hasattr(options, "network_weights"):
        check_lora_files(options)
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


def set_backends(*, tf32: bool = False, benchmark: bool = False) -> None:
    """How float32 products and convolutions are computed on a card.

    By itself torch allows TF32 in convolutions, which the VAE of previews and `sample` consists of.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark


def uses_fused_blocks(options: TrainOptions | SampleOptions, device: torch.device) -> bool:
    """Whether the DiT runs through the fused kernels; torch.compile takes the eager blocks.

    Raises `UserError` when they are asked for and cannot run.
    """
    if options.kernels == "triton":
        check_triton("--kernels triton", "--kernels eager", device)
        return True
    compiled = getattr(options, "compile", False)
    if options.kernels == "eager" or compiled or device.type != "cuda":
        return False
    return importlib.util.find_spec("triton") is not None


def check_output_folder(options: TrainOptions) -> None:
    """Prove now, not after an hour, that the output folder can be written."""
    if not options.output_dir:
        raise UserError("--output_dir is required: the folder for files, log and states")
    check_folder(options.output_dir)
