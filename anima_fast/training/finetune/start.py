"""What full fine-tuning starts from, and who updates its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit import dit_tensors
from anima_fast.models.llm_adapter import adapter_tensors
from anima_fast.training.checks import given
from anima_fast.training.finetune.full_network import FullNetwork, joined
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.recipes import Recipe, find_optimizer
from anima_fast.training.optimizers.weight_updates import WeightUpdates

if TYPE_CHECKING:
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


def base_tensors(path: str, adapter_path: str | None) -> tuple[Checkpoint, bool]:
    """The tensors that a run starts from, and whether the DiT's file has the adapter inside.

    The adapter is that of `adapter_path` when it is given. Files are mapped, nothing is read.
    """
    source = Checkpoint.open(path)
    bundled = adapter_tensors(source)
    adapter = adapter_tensors(Checkpoint.open(adapter_path)) if adapter_path else bundled
    return joined(dit_tensors(source), adapter), bundled is not None


def build_updates(
    options: FinetuneOptions, network: FullNetwork, device: torch.device, *, seed: int
) -> tuple[WeightUpdates, list[str]]:
    """The optimizer of the trained weights, and notices for the user.

    Raises `UserError` for arguments that its class refuses.
    """
    recipe, _ = find_optimizer(options.optimizer_type)
    inner, notices = build_optimizer(options, network, options.lr_scheduler)
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
    averages = callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None))
    if averages and (options.blocks_to_swap or not in_place):
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
