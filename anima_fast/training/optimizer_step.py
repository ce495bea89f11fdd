"""The end of an optimizer step: clip, step, schedule, zero; and what is logged about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anima_fast.memory.free import peak_memory_mib
from anima_fast.training.optimizers.build import clip_flat_grad, effective_rates, learning_rates

if TYPE_CHECKING:
    from anima_fast.data.batches import Batch
    from anima_fast.training.bad_batches import BadBatchTracker
    from anima_fast.training.position import Position
    from anima_fast.training.run import Run


def optimizer_step(
    run: Run,
    group: list[tuple[Batch, Tensor]],
    bad_batches: BadBatchTracker,
    *,
    say: Callable[[str], None],
) -> dict:
    """Clip, step unless something is not finite, schedule, zero.

    Args:
        group: the micro-batches whose gradients stand in the buffer, with their losses [B].

    Returns:
        `loss` (mean), `grad_norm` (before clipping), and `max_norm` with `scale_weight_norms`.
    """
    run.scaler.unscale_(run.optimizer)
    norm = clip_flat_grad(run.network, run.options.max_grad_norm, run.optimizer)
    loss = torch.stack([losses.mean() for _, losses in group]).mean()
    # The one wait for the device in a step: both numbers come back together.
    loss, norm = torch.stack([loss, norm]).tolist()
    facts: dict = {"loss": loss, "grad_norm": norm}
    if bad_batches.accepts(group, loss, norm, run.scaler, say=say):
        run.scaler.step(run.optimizer)
        if run.options.scale_weight_norms:
            scaled, mean, largest = run.network.scale_weight_norms(run.options.scale_weight_norms)
            facts["max_norm"] = {
                "keys_scaled": scaled, "average_key_norm": mean, "max_key_norm": largest
            }  # fmt: skip
        if run.ema is not None:
            run.ema.update()
    run.scaler.update()
    with warnings.catch_warnings():
        # A skipped batch moves the schedule without a step of the optimizer, on purpose.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        run.scheduler.step()
    run.network.zero_grad_flat()
    return facts


def step_record(
    run: Run,
    position: Position,
    group: list[tuple[Batch, Tensor]],
    facts: dict,
    seconds: float,
) -> dict:
    """What is logged and shown about one optimizer step."""
    small = sum(batch.small for batch, _ in group)
    return {
        "step": position.step,
        "epoch": position.epoch,
        **({"lowres": small / len(group)} if run.options.sigma_lowres else {}),
        **facts,
        "loss_avg": position.loss_average,
        "lr": learning_rates(run.optimizer),
        "d_lr": effective_rates(run.optimizer),
        "step_s": seconds,
        "images_per_s": sum(len(batch.items) for batch, _ in group) / seconds,
        "memory_mib": peak_memory_mib(run.device),
    }
