"""One buffer for all parameters of a network and one for all gradients.

Each matrix is a leaf parameter whose data and whose `.grad` are views, so autograd adds gradients
in place. Groups of a learning rate are contiguous: an optimizer step, a norm or a copy of one is
one launch, however many modules there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# 32 elements keep every matrix on a 128-byte boundary in float32.
ALIGNMENT = 32


@dataclass(frozen=True)
class ParamGroup:
    """A learning-rate group: its name, its rate and its matrices, in buffer order."""

    name: str
    lr: float
    params: tuple[nn.Parameter, ...]


class FlatBuffer:
    """Moves parameters into one buffer and their gradients into another.

    Args:
        groups: trained matrices; they become contiguous in this order.
        frozen: matrices that are saved but not trained, placed after the groups.
        device, dtype: of both buffers.

    Attributes:
        flat, flat_grad: the buffers; `trained` elements of the first have a gradient.
        slices: one parameter per group, a slice of `flat` whose `.grad` is that of `flat_grad`.
            They are always the same, since an optimizer keeps its state by parameter.
    """

    @torch.no_grad()
    def __init__(
        self,
        groups: list[ParamGroup],
        frozen: list[nn.Parameter],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.trained = sum(_aligned(p) for group in groups for p in group.params)
        total = self.trained + sum(_aligned(p) for p in frozen)
        self.flat = torch.zeros(total, device=device, dtype=dtype)
        self.flat_grad = torch.zeros(self.trained, device=device, dtype=dtype)
        self.slices: list[nn.Parameter] = []
        offset = 0
        for group in groups:
            start = offset
            for param in group.params:
                param.data = _part(self.flat, offset, param).copy_(param)
                param.grad = _part(self.flat_grad, offset, param)
                offset += _aligned(param)
            self.slices.append(nn.Parameter(self.flat[start:offset]))
            self.slices[-1].grad = self.flat_grad[start:offset]
        for param in frozen:
            param.data = _part(self.flat, offset, param).copy_(param)
            param.requires_grad_(False)
            offset += _aligned(param)


def _part(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    return buffer[offset : offset + like.numel()].view(like.shape)


def _aligned(param: Tensor) -> int:
    return -(-param.numel() // ALIGNMENT) * ALIGNMENT
