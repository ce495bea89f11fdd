"""LoRA training: adapters on frozen weights, in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anima_fast.adapters.metadata import loader_metadata, training_metadata
from anima_fast.adapters.network import LoRANetwork
from anima_fast.data.summary import summarise
from anima_fast.measure.arithmetic import Arithmetic
from anima_fast.memory.offload import install_memory_savers
from anima_fast.training.adapter_setup import base_files, build_network, check_files, check_network
from anima_fast.training.kind import Say, Training, save_dtype
from anima_fast.training.optimizers.build import build_optimizer, clip_flat_grad
from anima_fast.training.optimizers.ema import Ema, exchanged
from anima_fast.training.planning import check_memory
from anima_fast.training.state_checks import LORA_REMEDIES

if TYPE_CHECKING:
    from anima_fast.data.conditioning import Conditioning
    from anima_fast.data.items import DatasetPlan
    from anima_fast.models.dit import AnimaDiT
    from anima_fast.models.dit_config import DitConfig
    from anima_fast.options.run import TrainOptions


class LoRATraining(Training):
    """Trains a `LoRANetwork` on a frozen model."""

    name = "LoRA training"
    remedies = LORA_REMEDIES
    options: TrainOptions
    network: LoRANetwork
    # Clips the flat gradient; the project's own AdamW does so in its step.
    _clip: Callable[[float], Tensor]

    def __init__(
        self, options: TrainOptions, device: torch.device, seed: int, arithmetic: Arithmetic
    ) -> None:
        rank = {"rank, alpha": f"{options.network_dim}, {options.network_alpha:g}"}
        super().__init__(rank, device, seed, arithmetic)
        self.options = options
        # Frozen weights can be swapped at any time, except those of compiled blocks.
        self.can_swap_later = not options.compile
        self.cuda_graphs = options.cuda_graphs
        self._summary: dict[str, Any] | None = None

    def check(self, sizes: DitConfig) -> None:
        """Refuse missing LoRA files and a network that does not fit the DiT."""
        check_files(self.options)
        check_network(self.options, sizes)

    def check_room(self, plan: DatasetPlan, say: Say) -> None:
        """Say what memory the run will take on a card, and refuse too little of it."""
        check_memory(self.options, plan, self.device, say=say)

    def build(self, dit: AnimaDiT, conditioning: Conditioning, say: Say) -> list[str]:
        """Attach the adapters and make their optimizer."""
        options, device = self.options, self.device
        network = build_network(options, dit, conditioning, seed=self.seed, say=say)
        self.network = network.to(device)
        install_memory_savers(options, dit, device, cuda_graphs=self.cuda_graphs)
        if self.fused and conditioning.adapter is not None:
            conditioning.adapter.fuse_norms()
        if options.ema_decay is not None:
            self.ema = Ema(self.network.flat, options.ema_decay)
        return self._build_optimizer()

    def _build_optimizer(self) -> list[str]:
        options, network = self.options, self.network
        if self.fused:
            # Not at the top: triton is not on every system.
            from anima_fast.training.optimizers.flat_adamw import build_flat_adamw

            if own := build_flat_adamw(options, network):
                self.optimizer, self._clip = own, own.clip_gradients
                return []
        self._clip = partial(clip_flat_grad, network.flat_grad)
        self.optimizer, notices = build_optimizer(
            options, network.param_groups, options.lr_scheduler
        )
        return notices

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients of all groups together."""
        return self._clip(max_norm)

    def after_step(self) -> dict[str, Any]:
        """Scale pairs whose product has grown too large, and move the running mean."""
        facts: dict[str, Any] = {}
        if limit := self.options.scale_weight_norms:
            scaled, mean, largest = self.network.scale_weight_norms(limit)
            facts["max_norm"] = {
                "keys_scaled": scaled, "average_key_norm": mean, "max_key_norm": largest
            }  # fmt: skip
        if self.ema is not None:
            self.ema.update()
        return facts

    def fingerprint(self) -> dict[str, Any]:
        """The files merged into the model before training."""
        files = base_files(self.options)
        merged = [f"{Path(path).name} {strength:g}" for path, strength in files]
        return {"base_weights": merged} if merged else {}

    def metadata(self, plan: DatasetPlan, facts: Mapping[str, Any] | None) -> dict[str, str]:
        """The `ss_` and `modelspec.` keys."""
        if facts is None:
            return loader_metadata(self.options)
        if self._summary is None and not self.options.no_metadata:
            # Seconds with many captions, and the same at every save.
            self._summary = summarise(plan)
        return training_metadata(self.options, self._summary or {}, facts)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the LoRA in the format and precision asked for."""
        self.network.save(
            path,
            dialect=self.options.lora_format,
            dtype=save_dtype(self.options),
            metadata=metadata,
            fold_alpha=self.options.fold_alpha,
        )

    def preview_weights(self) -> AbstractContextManager[None]:
        """Inside the block the LoRA is rounded as its file is."""
        flat, dtype = self.network.flat, save_dtype(self.options)
        return nullcontext() if dtype is None else exchanged(flat, flat.detach().to(dtype))
