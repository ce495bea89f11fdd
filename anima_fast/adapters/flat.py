"""One buffer for all parameters of a network and one for all gradients.

Each matrix is a leaf parameter whose data and whose `.grad` are views, so autograd adds gradients
in place. Matrices that share a learning rate are contiguous: a group is a slice, and an optimizer
step, a gradient norm or a copy is one launch, however many modules there are.
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
    """

    def __init__(
        self,
        groups: list[ParamGroup],
        frozen: list[nn.Parameter],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.groups = groups
        self.frozen = frozen
        self.ranges: list[tuple[int, int]] = []
        total = 0
        for group in groups:
            start = total
            total += sum(_aligned(p) for p in group.params)
            self.ranges.append((start, total))
        self.trained = total
        total += sum(_aligned(p) for p in frozen)
        self.flat = torch.zeros(total, device=device, dtype=dtype)
        self.flat_grad = torch.zeros(self.trained, device=device, dtype=dtype)
        self._slices: list[nn.Parameter] | None = None
        self._place()

    @torch.no_grad()
    def _place(self) -> None:
        offset = 0
        for param in [*(p for g in self.groups for p in g.params), *self.frozen]:
            view = self.flat[offset : offset + param.numel()].view(param.shape)
            view.copy_(param)
            param.data = view
            if offset < self.trained:
                param.grad = self.flat_grad[offset : offset + param.numel()].view(param.shape)
            else:
                param.requires_grad_(False)
            offset += _aligned(param)

    def group_slices(self) -> list[nn.Parameter]:
        """One parameter per group: a slice of `flat` with the slice of `flat_grad` as its `.grad`.

        The slices are created once, since an optimizer keeps its state by parameter.
        """
        if self._slices is None:
            self._slices = []
            for start, end in self.ranges:
                param = nn.Parameter(self.flat[start:end])
                param.grad = self.flat_grad[start:end]
                self._slices.append(param)
        return self._slices


def _aligned(param: Tensor) -> int:
    return -(-param.numel() // ALIGNMENT) * ALIGNMENT
