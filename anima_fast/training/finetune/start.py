"""The start of full fine-tuning: which weights are trained, where they live, who updates them.

The rest of a run (data, loop, checkpoints, resume) is the one of LoRA training; `train_model` gives
it a `FullNetwork` and an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from anima_fast.adapters.metadata import modelspec
from anima_fast.errors import UserError
from anima_fast.memory.install import install_memory_savers
from anima_fast.models.checkpoint import Checkpoint
from anima_fast.models.dit import AnimaDiT, dit_tensors
from anima_fast.models.llm_adapter import adapter_tensors
from anima_fast.training.finetune.full_network import (
    ADAPTER,
    FullNetwork,
    describe,
    keep_masters,
    train_everything,
)
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.names import Recipe, find_optimizer
from anima_fast.training.optimizers.weight_updates import WeightUpdates

if TYPE_CHECKING:
    from anima_fast.data.conditioning import Conditioning
    from anima_fast.data.items import DatasetPlan
    from anima_fast.options.run import FinetuneOptions

# Packages whose optimizers keep nothing but state of each parameter, so that parameters can be
# stepped one after the other.
SEPARABLE = ("torch.optim", "bitsandbytes.optim", "lion_pytorch", "transformers.optimization")


def train_model(
    options: FinetuneOptions,
    dit: AnimaDiT,
    conditioning: Conditioning,
    *,
    device: torch.device,
    seed: int,
    say: Callable[[str], None],
) -> tuple[FullNetwork, WeightUpdates, list[str]]:
    """Make the model trainable, move it to where it is trained, and build its optimizer.

    Args:
        options: of the run.
        dit: frozen, on the device, or on the CPU with block swap.
        conditioning: its adapter is trained when it has a rate.
        device: where steps are computed.
        seed: of random rounding.
        say: gets what is trained.

    Returns:
        The network, its optimizer and notices of the optimizer.

    Raises:
        UserError: nothing to train, or an optimizer that cannot work this way.
    """
    adapter = conditioning.adapter if options.trains_llm_adapter else None
    base, bundled = base_tensors(options.pretrained_model_name_or_path, options.llm_adapter_path)
    network = train_everything(
        dit,
        adapter,
        options.part_rates,
        base,
        saves_adapter=bundled or adapter is not None,
        dtype=training_dtype(options),
    )
    install_memory_savers(options, dit, device, sink=network.swapped_gradients)
    swapped = {id(param) for param in dit.block_runner.swap.weights} if swaps(options) else set()
    for weight in network.weights:
        weight.swapped = id(weight.param) in swapped
    if options.weight_update == "fp32":
        keep_masters(network, base.get)
    optimizer, notices = build_updates(options, network, device, seed=seed)
    network.attach(optimizer)
    say(describe(network))
    return network, optimizer, notices


def swaps(options: FinetuneOptions) -> bool:
    """Whether some blocks live in host memory."""
    return bool(options.blocks_to_swap)


def data_notices(plan: DatasetPlan) -> list[str]:
    """What the dataset asks for and only a LoRA has."""
    if all(item.dataset.network_multiplier == 1 for item in plan.items):
        return []
    return ["network_multiplier has no effect: full fine-tuning has no network to scale"]


def training_dtype(options: FinetuneOptions) -> torch.dtype:
    """What the weights count as, and are saved as: float32 unless 16 bit was asked for."""
    if options.full_bf16:
        return torch.bfloat16
    return torch.float16 if options.full_fp16 else torch.float32


def base_tensors(path: str, adapter_path: str | None) -> tuple[Checkpoint, bool]:
    """The tensors that a run starts from, and whether the DiT's file has the adapter inside.

    The adapter is that of `adapter_path` when it is given. Files are mapped, nothing is read.
    """
    source = Checkpoint.open(path)
    dit, bundled = dit_tensors(source), adapter_tensors(source)
    separate = Checkpoint.open(adapter_path) if adapter_path else None
    adapter = bundled if separate is None else adapter_tensors(separate)
    shapes = dict(dit.shapes)
    if adapter is not None:
        shapes |= {ADAPTER + name: shape for name, shape in adapter.shapes.items()}

    def get(name: str) -> torch.Tensor:
        own = name.startswith(ADAPTER)
        return adapter.get(name.removeprefix(ADAPTER)) if own else dit.get(name)

    return Checkpoint(shapes, get, path=source.path), bundled is not None


def build_updates(
    options: FinetuneOptions, network: FullNetwork, device: torch.device, *, seed: int
) -> tuple[WeightUpdates, list[str]]:
    """The optimizer of the trained weights, and notices for the user.

    Raises `UserError` for arguments that its class refuses.
    """
    kind = options.optimizer_type
    recipe, _ = find_optimizer(kind)
    inner, notices = build_optimizer(options, network)
    half = options.full_bf16 or options.full_fp16
    updates = WeightUpdates(
        inner,
        network.weights,
        device,
        update=options.weight_update,
        seed=seed,
        together=looks_at_all(recipe),
        fused=options.fused_backward_pass,
        max_grad_norm=options.max_grad_norm,
        wide_gradients=not half and options.gradient_accumulation_steps > 1,
    )
    return updates, notices


def looks_at_all(recipe: Recipe) -> bool:
    """Whether an optimizer may need all parameters in one step (unknown ones may)."""
    return recipe.adaptive or recipe.module not in SEPARABLE


def check_optimizer(options: FinetuneOptions) -> None:
    """Refuse an optimizer that cannot work with how the weights are kept and updated.

    Raises `UserError`, also for an unknown or missing optimizer.
    """
    kind = options.optimizer_type
    recipe, cls = find_optimizer(kind)
    in_place = options.mixed_precision == "no" or options.weight_update == "plain"
    averages = callable(getattr(cls, "train", None)) and callable(getattr(cls, "eval", None))
    if averages and (options.blocks_to_swap or not in_place):
        raise UserError(
            f"--optimizer_type {kind} keeps its average in the weights themselves: use it with "
            "--mixed_precision no and without --blocks_to_swap, or take AdamW"
        )
    for option in ("fused_backward_pass", "blocks_to_swap"):
        if looks_at_all(recipe) and getattr(options, option):
            raise UserError(
                f"--{option} steps weights one after the other, and --optimizer_type {kind} may "
                "look at all of them: use AdamW, AdamW8bit, AdaFactor or Lion, or drop it"
            )


def model_metadata(options: FinetuneOptions) -> dict[str, str]:
    """The header metadata of a saved model; with `no_metadata` only what loaders look for."""
    metadata = {"format": "pt"}
    if options.no_metadata:
        return metadata
    metadata |= modelspec(options)
    metadata["modelspec.architecture"] = "anima-preview"
    if options.training_comment:
        metadata["modelspec.comment"] = options.training_comment
    return metadata
