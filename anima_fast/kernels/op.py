"""What the registry knows of an op: enough to test, benchmark and predict it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """Memory traffic and arithmetic of one call, each value and gradient touched once.

    `bytes` counts reads and writes of tensors in device memory, `flops` the products on tensor
    cores (two per multiply-add); elementwise arithmetic hides behind the memory traffic.
    """

    forward_bytes: float
    backward_bytes: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0


def passes(forward: int, backward: int) -> Callable[[Sizes, int], Cost]:
    """The cost of an op that reads and writes so many tensors of the product of its sizes."""

    def cost(sizes: Sizes, itemsize: int) -> Cost:
        unit = math.prod(sizes.values()) * itemsize
        return Cost(forward_bytes=forward * unit, backward_bytes=backward * unit)

    return cost


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        name: its key in `OPS`.
        function: the public function, Triton or reference by device.
        reference: the definition in plain torch: same arguments, differentiable.
        make_inputs: (sizes, dtype, device) → keyword arguments, drawn from the global generator.
        grads: the arguments that get a gradient.
        shapes: sizes for parity: ones, odd, larger than a tile.
        model_shapes: a few rows of the model's own widths and lengths, for parity too: what only
            long sums, rows of full width or a small variance show.
        summed: sizes → the terms of the longest sum in a result or a gradient: float32 rounds
            each of them.
        real_shapes: label → sizes at a number of image tokens in the 2B model, for benchmarks.
        cost: (sizes, bytes per element) → `Cost`.
        dtypes: those that a card runs; parity adds float64.
        yardstick: the type whose eager error, halved, is what parity allows, on the same float32
            inputs; None: the eager error of the kernel's own type, doubled.
        cost_note: what the cost counts, for the reader of a table.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    make_inputs: Callable[[Sizes, torch.dtype, torch.device | str], Inputs]
    grads: tuple[str, ...]
    shapes: tuple[Sizes, ...]
    real_shapes: Callable[[int], Mapping[str, Sizes]]
    cost: Callable[[Sizes, int], Cost]
    model_shapes: tuple[Sizes, ...] = ()
    summed: Callable[[Sizes], int] = lambda _sizes: 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    yardstick: torch.dtype | None = None
    cost_note: str = ""

    @property
    def of_half(self) -> bool:
        """Whether the op is float16's alone, without a twin in float64."""
        return self.dtypes == (torch.float16,)


def randn(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, drawn on the CPU in float64 so that every dtype rounds the same."""
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(device)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 when it already is: the type that references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
