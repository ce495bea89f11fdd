"""The trained weights of full fine-tuning: where each one lives and where its gradient goes.

The model computes with `param`, in the compute dtype. What is updated and saved, the `truth`, is
`param` itself or its float32 master. If the weight's block is swapped, both are in pinned host
memory, and so are its gradient and its optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from anima_fast.memory.swap import host_copy

# Optimizer state of a swapped weight is moved to host memory from this many elements on.
SMALLEST_MOVED = 4096


@dataclass(eq=False)
class Weight:
    """One trained tensor.

    Attributes:
        name: its published name, `llm_adapter.` included, without `net.`.
        param: what the model computes with.
        part: the learning-rate part (options.finetune.PARTS, or base).
        swapped: `param` and everything else of it is in host memory.
        master: the truth in float32 if `param` is a rounded copy.
        state_home: where optimizer state is kept between steps, by name.
    """

    name: str
    param: nn.Parameter
    part: str
    swapped: bool = False
    master: Tensor | None = None
    state_home: dict[str, Tensor] = field(default_factory=dict)

    @property
    def truth(self) -> Tensor:
        """What is updated and saved."""
        return self.param.data if self.master is None else self.master

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Write a new value to the master and, rounded, to what the model computes with."""
        if self.master is not None and self.master is not value:
            self.master.copy_(value, non_blocking=True)
        # Converted where it is: a copy between devices that converts does it on the processor.
        self.param.data.copy_(value.to(self.param.dtype), non_blocking=True)

    def keep_master(self, value: Tensor) -> None:
        """Keep `value` as the float32 master."""
        wide = value.detach().to(torch.float32)
        if self.swapped:
            self.master = host_copy(wide, pinned=torch.cuda.is_available())
        else:
            self.master = wide.to(self.param.device, copy=True)


class Gradients:
    """The gradients of a step; none are kept if each is used as soon as it is there.

    Args:
        weights: all trained weights.
        device: where gradients come from.
        wide: gradients of several micro-batches add up in float32, else in their own dtype.
        use: gets each gradient at once; nothing is kept (the fused backward pass).
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        device: torch.device,
        *,
        wide: bool = False,
        use: Callable[[Weight, Tensor], None] | None = None,
    ) -> None:
        self.weights = list(weights)
        self.device, self.wide, self.use = device, wide, use
        self.kept: dict[Weight, Tensor] = {}
        self.norms: dict[Weight, Tensor] = {}
        self._host: dict[Weight, Tensor] = {}
        for weight in self.weights:
            if not weight.swapped:
                weight.param.register_post_accumulate_grad_hook(partial(self._take_from, weight))

    def _take_from(self, weight: Weight, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        self.take(weight, grad)

    @torch.no_grad()
    def take(self, weight: Weight, grad: Tensor) -> None:
        """Use a gradient, or add it to those of the previous micro-batches."""
        if self.use is not None:
            self.norms[weight] = norm_of(grad)
            self.use(weight, grad)
            return
        if self.wide:
            grad = grad.to(torch.float32)
        before = self.kept.get(weight)
        if before is not None:
            grad = before.to(self.device, non_blocking=True).add_(grad)
        if not weight.swapped:
            self.kept[weight] = grad
            return
        # Here, while it is on the device: host memory is slow to read.
        self.norms[weight] = norm_of(grad)
        if weight not in self._host:
            pinned = self.device.type == "cuda"
            self._host[weight] = torch.empty(grad.shape, dtype=grad.dtype, pin_memory=pinned)
        self.kept[weight] = self._host[weight].copy_(grad, non_blocking=True)

    def norm(self) -> Tensor:
        """The norm of all gradients of this step, a float32 scalar on the device."""
        norms = self.norms | {w: norm_of(g) for w, g in self.kept.items() if w not in self.norms}
        found = [norms[weight] for weight in self.weights if weight in norms]
        if not found:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(found))

    def clear(self) -> None:
        """Forget the gradients of this step; their host memory is used again in the next."""
        self.kept.clear()
        self.norms.clear()


def norm_of(grad: Tensor) -> Tensor:
    """The norm of one gradient, a float32 scalar on its device."""
    return torch.linalg.vector_norm(grad, dtype=torch.float32)
