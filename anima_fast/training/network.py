"""What the loop, the step, validation, checkpoints and resume states ask of the thing they train.

Two classes answer: `adapters.lora.LoRANetwork`, adapters beside frozen weights, and
`training.full_network.FullNetwork`, the weights themselves. What only one of them has (LoRA's flat
buffer, its dialects, its norms) is used behind an option that only that kind of training has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Network(Protocol):
    """The trained part of a run."""

    # Strength of adapters, set for every batch.
    multiplier: float

    def train(self) -> Any:
        """Turn dropouts on."""

    def eval(self) -> Any:
        """Turn dropouts off."""

    def at_noise(self, sigma: Tensor) -> None:
        """Told before each forward: the noise levels [B] of the batch."""

    def param_groups(self, flat: bool = True) -> list[dict]:
        """Groups for an optimizer: {"params", "lr", "name"}; `flat` allows one tensor a group."""

    def zero_grad_flat(self) -> None:
        """Forget all gradients."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume state holds, by name, exactly."""

    def load(self, path: str | os.PathLike) -> list[str]:
        """Take what a file holds; returns the names in it that do not belong here."""

    def save(
        self,
        path: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write the file that users load; raises `UserError` for numbers that are not finite."""
