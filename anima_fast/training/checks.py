"""What can be refused before a run starts: device, attention backend, files, output folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from anima_fast.device import (
    DTYPES,
    check_torch_version,
    set_backends,
    uses_fused_blocks,
)
from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.memory.offload import BlockSettings
from anima_fast.models.attention import check_attn_mode
from anima_fast.models.model_files import check_model_files
from anima_fast.sampling.prompts import collect_prompts
from anima_fast.training.optimizers.recipes import find_optimizer

if TYPE_CHECKING:
    from anima_fast.options.output import SaveOptions, ValidationOptions
    from anima_fast.options.run import FinetuneOptions, TrainOptions
    from anima_fast.training.kind import Training


T = TypeVar("T")


def given(value: T | None) -> T:
    """A value that earlier checks have found to be there."""
    assert value is not None
    return value


def check_start(
    options: TrainOptions | FinetuneOptions, training: Training, device: torch.device
) -> Path:
    """Refuse what can be refused before anything is encoded, and set the backend switches.

    Returns the output folder.
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
    training.check(dit)
    find_optimizer(options.optimizer_type)
    collect_prompts(options)
    BlockSettings.of(options, training.cuda_graphs).policies(dit.num_blocks, fused=fused)
    if options.mixed_precision == "bf16" and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(
                "this card has no bfloat16 units: use --mixed_precision fp16 (the residual stream "
                "stays in fp32) or no"
            )
    folder = check_output_folder(options)
    set_backends(tf32=options.cuda_allow_tf32, benchmark=options.cuda_cudnn_benchmark)
    return folder


def check_output_folder(options: SaveOptions) -> Path:
    """Prove now, not after an hour, that the output folder can be written."""
    if not options.output_dir:
        raise UserError("--output_dir is required: the folder for files, log and states")
    check_folder(options.output_dir)
    return Path(options.output_dir)


def check_validation(options: ValidationOptions, say: Callable[[str], None]) -> None:
    """What options of validation mean where no image is held out."""
    if options.early_stop_patience:
        raise UserError(
            "--early_stop_patience needs a validation loss, and no image is held out: set "
            "validation_split in the dataset file, or drop it"
        )
    for name in ("validate_every_n_steps", "validate_every_n_epochs"):
        if getattr(options, name):
            say(f"{name} has no effect: no image is held out (validation_split)")
