"""Full fine-tuning: the model's own weights are trained.

The data, the loop, checkpoints and resuming are those of LoRA training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anima_fast.adapters.metadata import bounded, modelspec
from anima_fast.measure.arithmetic import Arithmetic
from anima_fast.memory.offload import BlockRunner, install_memory_savers
from anima_fast.training.finetune import start
from anima_fast.training.finetune.full_network import FullNetwork, train_everything
from anima_fast.training.kind import Say, Training, save_dtype
from anima_fast.training.planning import check_memory
from anima_fast.training.state_checks import Remedies

if TYPE_CHECKING:
    from anima_fast.data.conditioning import Conditioning
    from anima_fast.data.items import DatasetPlan
    from anima_fast.models.dit import AnimaDiT
    from anima_fast.options.run import FinetuneOptions
    from anima_fast.training.optimizers.weight_updates import WeightUpdates


class Finetuning(Training):
    """Trains a `FullNetwork`, the weights of the DiT and perhaps of its LLM adapter."""

    name = "Full fine-tuning"
    remedies = Remedies(
        start_over="start again with --pretrained_model_name_or_path and a saved model",
        same_network="the learning rates of that run (0 freezes), --full_bf16 and --weight_update",
        compares_dtypes=True,
    )
    saves_whole_model = True
    options: FinetuneOptions
    network: FullNetwork
    optimizer: WeightUpdates

    def __init__(
        self, options: FinetuneOptions, device: torch.device, seed: int, arithmetic: Arithmetic
    ) -> None:
        rates = [f"{part} {rate:g}" for part, rate in options.part_rates.items()]
        weights = str(start.training_dtype(options)).removeprefix("torch.")
        facts = {
            "learning rates": ", ".join(rates),
            "weights, updates": f"{weights}, {options.weight_update}",
        }
        super().__init__(facts, device, seed, arithmetic)
        self.options = options
        self.updates_in_backward = options.fused_backward_pass

    def check_room(self, plan: DatasetPlan, say: Say) -> None:
        """Refuse an optimizer that cannot work this way, and too little memory or disk space."""
        start.check_optimizer(self.options)
        check_memory(self.options, plan, self.device, say=say)
        start.check_disk(self.options, self.device, say=say)
        if any(item.dataset.network_multiplier != 1 for item in plan.items):
            say("network_multiplier has no effect: full fine-tuning has no network to scale")

    def build(self, dit: AnimaDiT, conditioning: Conditioning, say: Say) -> list[str]:
        """Make the model trainable, and its optimizer."""
        options = self.options
        adapter = conditioning.adapter if options.trains_llm_adapter else None
        base, bundled = start.base_tensors(options)
        self.network = train_everything(
            dit,
            adapter,
            options.part_rates,
            base,
            saves_adapter=bundled or adapter is not None,
            dtype=start.training_dtype(options),
        )
        self.sink = self.network.swapped_gradients
        install_memory_savers(options, dit, self.device, sink=self.sink)
        runner = dit.block_runner
        if isinstance(runner, BlockRunner) and runner.swap is not None:
            swapped = {id(param) for param in runner.swap.weights}
            for weight in self.network.weights:
                weight.swapped = id(weight.param) in swapped
        if options.weight_update == "fp32":
            for weight in self.network.weights:
                # The file may be more exact than the weight.
                if weight.param.dtype != torch.float32:
                    weight.keep_master(base.get(weight.name))
        self.optimizer, notices = start.build_updates(
            options, self.network, self.device, seed=self.seed
        )
        self.network.updates = self.optimizer
        counts: Counter[str] = Counter()
        for weight in self.network.weights:
            counts[weight.part] += weight.param.numel()
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
        say(f"{sum(counts.values()):,} parameters are trained: {parts}")
        return notices

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients together; a fused backward pass has clipped each by itself."""
        return self.optimizer.clip_gradients(max_norm)

    def metadata(self, plan: DatasetPlan, facts: Mapping[str, Any] | None) -> dict[str, str]:
        """The `modelspec.` keys."""
        options, metadata = self.options, {"format": "pt"}
        if facts is not None and not options.no_metadata:
            metadata |= modelspec(options) | {"modelspec.architecture": "anima-preview"}
            if options.training_comment:
                metadata["modelspec.comment"] = options.training_comment
        return bounded(metadata)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the whole model."""
        self.network.save(path, dtype=save_dtype(self.options), metadata=metadata)
