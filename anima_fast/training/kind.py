"""What LoRA training and full fine-tuning do differently, as one interface.

Setup makes a `LoRATraining` (lora.py) or a `Finetuning` (finetune/finetuning.py); everything else
asks `run.training` and knows neither. What either trains is a `Network`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from anima_fast.training.state_checks import Remedies

if TYPE_CHECKING:
    from anima_fast.data.conditioning import Conditioning
    from anima_fast.data.items import DatasetPlan
    from anima_fast.memory.swap import Sink
    from anima_fast.models.dit import AnimaDiT
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.training.optimizers.ema import Ema

# The dtype of saved files by `save_precision`; None keeps that of training.
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Network(Protocol):
    """The trained part of a run."""

    # Strength of adapters, set for every batch.
    multiplier: float

    def train(self) -> Any:
        """Turn dropout on."""

    def eval(self) -> Any:
        """Turn dropout off."""

    def at_noise(self, sigma: Tensor) -> None:
        """Called before each forward with the noise levels [B] of the batch."""

    def param_groups(self, flat: bool = True) -> list[dict]:
        """Groups for an optimizer: {"params", "lr", "name"}; `flat` allows one tensor a group."""

    def zero_grad_flat(self) -> None:
        """Forget all gradients."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume state holds, by name, exactly."""

    def load(self, path: str | os.PathLike) -> list[str]:
        """Load a file; returns the names in it that do not belong here."""


class Training(Protocol):
    """One kind of training: what is trained, and all that only this kind does."""

    # What messages about a resume state that does not fit advise.
    remedies: Remedies
    # Files and states hold the whole model, gigabytes of it.
    saves_whole_model: bool
    # Whether more blocks may be swapped when memory runs out.
    can_swap_later: bool

    @property
    def network(self) -> Network:
        """What is trained, once it is built."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What trains it."""

    @property
    def ema(self) -> Ema | None:
        """The running mean of the weights, where one is kept."""

    @property
    def description(self) -> tuple[str, dict[str, str]]:
        """The name of this kind, and facts that only this kind has, for the report."""

    @property
    def cuda_graphs(self) -> bool | None:
        """Whether blocks run as CUDA graphs; None leaves it to the card."""

    @property
    def updates_in_backward(self) -> bool:
        """Whether weights change during backward, so that no step can be repeated."""

    @property
    def sink(self) -> Sink | None:
        """Gets the gradients of trained weights that are swapped."""

    def check(self, sizes: DitConfig) -> None:
        """Refuse what does not fit a DiT of these sizes, before anything is written."""

    def check_room(
        self, plan: DatasetPlan, device: torch.device, *, say: Callable[[str], None]
    ) -> None:
        """Refuse a run that memory or disk has no room for, before anything is encoded."""

    def build(
        self,
        dit: AnimaDiT,
        conditioning: Conditioning,
        *,
        device: torch.device,
        seed: int,
        say: Callable[[str], None],
    ) -> list[str]:
        """Make the network and its optimizer, and bring the DiT to where it is trained.

        Returns notices of the optimizer for the user.
        """

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of this step down to `max_norm` (0 = off).

        Returns their norm before, a float32 scalar on the device, without waiting for it.
        """

    def after_step(self) -> dict[str, Any]:
        """What follows an optimizer step; returns facts about it for the log."""

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the saved one, besides the dataset."""

    def save(self, path: Path, plan: DatasetPlan, facts: Mapping[str, Any]) -> None:
        """Write the file that users load.

        Args:
            path: the .safetensors file.
            plan: of the run.
            facts: of this moment, for the metadata (`adapters.metadata.training_metadata`).

        Raises:
            UserError: numbers that are not finite, or a disk that refuses.
        """

    def preview_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model has the weights of its saved file, for previews."""
