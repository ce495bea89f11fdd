"""What an optimizer keeps: measured by one step on small tensors, whatever its class."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.options.training import OptimizerOptions
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.recipes import find_optimizer

if TYPE_CHECKING:
    from anima_fast.adapters.network import LoRANetwork
    from anima_fast.options.run import FinetuneOptions

# Side of the matrix on which the state of full fine-tuning is measured.
SIDE = 512
# Larger tensors are not stepped: their state follows from two smaller ones.
LARGEST = 2**20


def state_bytes(options: FinetuneOptions, device: torch.device) -> float:
    """Bytes per trained number that the optimizer of full fine-tuning keeps.

    Raises `UserError` as `build_optimizer` does.
    """
    dtype = torch.float32
    if options.weight_update == "plain" and options.full_bf16:
        dtype = torch.bfloat16
    elif options.weight_update == "plain" and options.full_fp16:
        dtype = torch.float16
    return _state((SIDE, SIDE), options, dtype, device) / SIDE**2


def network_state_bytes(
    options: OptimizerOptions, network: LoRANetwork, device: torch.device
) -> float:
    """Bytes that the optimizer of a LoRA, which may be on the meta device, keeps on a device.

    Raises `UserError` as `build_optimizer` does.
    """
    recipe, _ = find_optimizer(options.optimizer_type)
    groups = network.param_groups(flat=recipe.flat)
    shapes = [tuple(param.shape) for group in groups for param in group["params"]]
    return sum(_state(shape, options, network.flat.dtype, device) for shape in shapes)


def _state(
    shape: tuple[int, ...], options: OptimizerOptions, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes kept for one tensor; of a large one by the slope over its first dimension."""
    # What the measurement depends on, and no more, as a key of its cache.
    rate = options.learning_rate or 1e-4
    plain = OptimizerOptions(options.optimizer_type, rate, options.optimizer_args)
    if math.prod(shape) <= LARGEST:
        return _measure(shape, plain, dtype, device)
    rest = shape[1:]
    few = max(LARGEST // 4 // math.prod(rest), 1)
    one, two = (_measure((n * few, *rest), plain, dtype, device) for n in (1, 2))
    return one + (two - one) * (shape[0] - few) / few


@cache
def _measure(
    shape: tuple[int, ...], options: OptimizerOptions, dtype: torch.dtype, device: torch.device
) -> int:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    param.grad = torch.ones_like(param)
    group = {"params": [param], "lr": options.learning_rate, "name": "probe"}
    optimizer, _ = build_optimizer(options, lambda flat: [group])
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
