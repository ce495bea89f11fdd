"""What LoRA training and full fine-tuning do differently, as one interface.

Setup makes a `LoRATraining` (lora.py) or a `Finetuning` (finetune/finetuning.py), once. Everything
else asks `run.training`, and knows neither. What either trains is a `Network`.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from anima_fast.console import describe_error
from anima_fast.device import DTYPES, uses_fused_blocks
from anima_fast.measure.arithmetic import Arithmetic
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.training.state_checks import Remedies

if TYPE_CHECKING:
    from anima_fast.data.conditioning import Conditioning
    from anima_fast.data.items import DatasetPlan
    from anima_fast.memory.swap import Sink
    from anima_fast.models.dit import AnimaDiT
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.options.output import SaveOptions
    from anima_fast.training.optimizers.ema import Ema

logger = logging.getLogger("anima_fast")

Say = Callable[[str], None]
AnyOptions = TrainOptions | FinetuneOptions
T = TypeVar("T")


def given(value: T | None) -> T:
    """A value that earlier checks have found to be there."""
    assert value is not None
    return value


def save_dtype(options: SaveOptions) -> torch.dtype | None:
    """The dtype of saved files; None keeps that of training."""
    return DTYPES[options.save_precision] if options.save_precision else None


def vae_dtype(options: AnyOptions, encoders: str) -> torch.dtype:
    """The dtype of the VAE where the other encoders have the precision `encoders`."""
    return torch.float32 if options.no_half_vae else DTYPES[encoders]


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

    def zero_grad_flat(self) -> None:
        """Forget all gradients."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a resume state holds, by name, exactly."""

    def load(self, path: str | os.PathLike) -> list[str]:
        """Load a file; returns the names in it that do not belong here."""


class Training(ABC):
    """One kind of training; what a kind does not override, it does not do.

    Attributes:
        options, device, seed, arithmetic: of the run.
        network, optimizer: what is trained, and what trains it; after `build`.
        ema: the running mean of the weights, if one is kept.
        name: of this kind, and `facts` that only it has, for the report.
        remedies: what messages about a resume state that does not fit advise.
        saves_whole_model: files and states hold the whole model, gigabytes of it.
        can_swap_later: more blocks may be swapped when memory runs out.
        updates_in_backward: weights change during backward, so no step can be repeated.
        cuda_graphs: whether blocks run as CUDA graphs; None leaves it to the card.
        sink: gets the gradients of trained weights that are swapped.
    """

    name: str
    options: AnyOptions
    network: Network
    optimizer: torch.optim.Optimizer
    remedies: Remedies
    ema: Ema | None = None
    saves_whole_model = False
    can_swap_later = False
    updates_in_backward = False
    cuda_graphs: bool | None = False
    sink: Sink | None = None

    def __init__(
        self, facts: dict[str, str], device: torch.device, seed: int, arithmetic: Arithmetic
    ) -> None:
        self.facts, self.device, self.seed = facts, device, seed
        self.arithmetic = arithmetic

    @cached_property
    def fused(self) -> bool:
        """Whether blocks, loss and optimizer run through the project's kernels."""
        options = self.options
        return uses_fused_blocks(options.kernels, self.device, compiled=options.compile)

    def check(self, sizes: DitConfig) -> None:  # noqa: B027
        """Refuse what does not fit a DiT of these sizes, before anything is written."""

    def check_room(self, plan: DatasetPlan, say: Say) -> None:  # noqa: B027
        """Refuse a run that memory or disk has no room for, before anything is encoded."""

    @abstractmethod
    def build(self, dit: AnimaDiT, conditioning: Conditioning, say: Say) -> list[str]:
        """Make the network and its optimizer, and bring the DiT to where it is trained.

        Args:
            dit: frozen, on the device, or on the CPU with block swap.
            conditioning: the text path that stays on the device.
            say: gets what is trained.

        Returns notices of the optimizer. Raises `UserError` when nothing would be trained, or the
        optimizer cannot train it.
        """

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of this step down to `max_norm` (0 = off).

        Returns their norm before, a float32 scalar on the device, without waiting for it.
        """

    def after_step(self) -> dict[str, Any]:
        """What follows an optimizer step; returns facts about it for the log."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the saved one, besides the dataset."""
        return {}

    def save(self, path: Path, plan: DatasetPlan, facts: Mapping[str, Any]) -> None:
        """Write the file that users load; metadata that cannot be made or written is left out.

        `facts` are those of this moment, for the metadata (`adapters.metadata.training_metadata`).
        Raises `UserError` for numbers that are not finite, or a disk that refuses.
        """
        try:
            return self.write(path, self.metadata(plan, facts))
        except Exception as error:
            problem = describe_error(error)
        # Outside of the handler, so that what fails again is reported alone.
        self.write(path, self.metadata(plan, None))
        logger.warning("%s was saved without its metadata: %s", path.name, problem)

    @abstractmethod
    def metadata(self, plan: DatasetPlan, facts: Mapping[str, Any] | None) -> dict[str, str]:
        """What a file says about itself; without `facts` only what loaders need."""

    @abstractmethod
    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file that users load, with this metadata; raises as `save` does."""

    def preview_weights(self) -> AbstractContextManager[None]:
        """Inside the block the weights are rounded as in the saved file, if a copy is cheap."""
        return nullcontext()
