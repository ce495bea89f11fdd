"""What full fine-tuning starts from, who updates its weights, and what it writes to the disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.memory.finetune import model_sizes
from anima_fast.memory.plan import GIB
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit import dit_tensors
from anima_fast.models.llm_adapter import adapter_tensors
from anima_fast.training.finetune.full_network import ADAPTER, FullNetwork, joined
from anima_fast.training.kind import Say, given, save_dtype
from anima_fast.training.optimizers.build import build_optimizer, is_schedule_free
from anima_fast.training.optimizers.probe import state_bytes
from anima_fast.training.optimizers.recipes import Recipe, find_optimizer
from anima_fast.training.optimizers.weight_updates import WeightUpdates

if TYPE_CHECKING:
    from anima_fast.options.data import ModelOptions
    from anima_fast.options.run import FinetuneOptions
    from anima_fast.options.training import MemoryOptions

# Packages whose optimizers keep nothing but state of each parameter, so that parameters can be
# stepped one after the other.
SEPARABLE = ("torch.optim", "bitsandbytes.optim", "lion_pytorch", "transformers.optimization")


def training_dtype(options: MemoryOptions) -> torch.dtype:
    """What the weights count as, and are saved as: float32 unless 16 bit was asked for."""
    if options.full_bf16:
        return torch.bfloat16
    return torch.float16 if options.full_fp16 else torch.float32


def base_tensors(options: ModelOptions) -> tuple[Checkpoint, bool]:
    """The tensors that a run starts from, and whether the DiT's file has the adapter inside.

    The adapter is that of `llm_adapter_path` when it is given. Files are mapped, nothing is read.
    """
    source = Checkpoint.open(given(options.pretrained_model_name_or_path))
    bundled = adapter_tensors(source)
    path = options.llm_adapter_path
    adapter = adapter_tensors(Checkpoint.open(path)) if path else bundled
    return joined(dit_tensors(source), adapter), bundled is not None


def build_updates(
    options: FinetuneOptions, network: FullNetwork, device: torch.device, *, seed: int
) -> tuple[WeightUpdates, list[str]]:
    """The optimizer of the trained weights, and notices for the user.

    Raises `UserError` for arguments that its class refuses.
    """
    recipe, _ = find_optimizer(options.optimizer_type)
    inner, notices = build_optimizer(options, network.param_groups, options.lr_scheduler)
    half = options.full_bf16 or options.full_fp16
    updates = WeightUpdates(
        inner,
        network.weights,
        device,
        update=given(options.weight_update),
        seed=seed,
        together=looks_at_all(recipe),
        fused=options.fused_backward_pass,
        max_grad_norm=options.max_grad_norm,
        wide_gradients=not half and options.gradient_accumulation_steps > 1,
    )
    return updates, notices


def looks_at_all(recipe: Recipe) -> bool:
    """Whether an optimizer may need all parameters in one step (unknown ones may)."""
    return recipe.adaptive or recipe.module not in SEPARABLE


def check_optimizer(options: FinetuneOptions) -> None:
    """Refuse an optimizer that cannot work with how the weights are kept and updated.

    Raises `UserError`, also for an unknown or missing optimizer.
    """
    kind = options.optimizer_type
    recipe, cls = find_optimizer(kind)
    in_place = options.mixed_precision == "no" or options.weight_update == "plain"
    if is_schedule_free(cls) and (options.blocks_to_swap or not in_place):
        raise UserError(
            f"--optimizer_type {kind} keeps its average in the weights themselves: use it with "
            "--mixed_precision no and without --blocks_to_swap, or take AdamW"
        )
    for option in ("fused_backward_pass", "blocks_to_swap"):
        if looks_at_all(recipe) and getattr(options, option):
            raise UserError(
                f"--{option} steps weights one after the other, and --optimizer_type {kind} may "
                "look at all of them: use AdamW, AdamW8bit, AdaFactor or Lion, or drop it"
            )


def check_disk(options: FinetuneOptions, device: torch.device, *, say: Say) -> None:
    """Refuse a run that would overwrite its base model or has no room for the one that it saves.

    Warns of resume states, which are several times as large as a model and may not fit.
    """
    target = Path(given(options.output_dir)) / f"{options.output_stem}.safetensors"
    if target.exists() and target.samefile(given(options.pretrained_model_name_or_path)):
        raise UserError(
            f"{target} is the base model itself: give another --output_name or --output_dir"
        )
    model, state = model_bytes(options), resume_bytes(options, device)
    # `check_start` has made the folder.
    free = shutil.disk_usage(target.parent).free
    if free < model:
        raise UserError(
            f"the trained model takes {model / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in "
            f"{options.output_dir}: free some space, give another --output_dir, or "
            "--save_precision bf16"
        )
    states = options.autosave_minutes or options.save_state or options.save_state_on_train_end
    # While a state is written, the one before it is still there.
    if states and free < model + 2 * state:
        say(
            f"a resume state takes {state / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in "
            f"{options.output_dir}: saving may fail; --autosave_minutes 0 writes none by itself"
        )


def model_bytes(options: FinetuneOptions) -> int:
    """Of the saved file."""
    base, bundled = base_tensors(options)
    saves_adapter = bundled or options.trains_llm_adapter
    numbers = sum(
        math.prod(shape)
        for name, shape in base.shapes.items()
        if saves_adapter or not name.startswith(ADAPTER)
    )
    return numbers * (save_dtype(options) or training_dtype(options)).itemsize


def resume_bytes(options: FinetuneOptions, device: torch.device) -> int:
    """Of a resume state: the trained weights as they are kept, and the optimizer's state."""
    base, _ = base_tensors(options)
    trained = model_sizes(options, base.shapes, adapter_stays=options.trains_llm_adapter).trained
    wide = options.mixed_precision == "no" or options.weight_update == "fp32"
    return int(trained * ((4 if wide else 2) + state_bytes(options, device)))
