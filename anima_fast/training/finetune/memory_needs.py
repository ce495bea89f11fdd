"""What the prediction of memory (memory/plan.py) needs to know, from options and file headers.

An optimizer's state is measured, not looked up: one step on a small matrix, whatever the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anima_fast.data.encode import choose_image_mode, choose_text_mode
from anima_fast.data.items import DatasetPlan
from anima_fast.memory.plan import (
    CPU_PROGRAM_BYTES,
    PROGRAM_BYTES,
    Prediction,
    Setting,
    Sizes,
    predict,
)
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.llm_adapter import AdapterConfig
from anima_fast.models.recompute import block_policies
from anima_fast.training.finetune.full_network import ADAPTER, part_of
from anima_fast.training.finetune.start import base_tensors, looks_at_all, training_dtype
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.recipes import find_optimizer
from anima_fast.training.optimizers.weight_updates import CHUNK

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions

# Side of the matrix on which an optimizer's state is measured.
PROBE = 512


@dataclass(frozen=True)
class Batch:
    """The largest batch of a dataset: images, tokens of each."""

    images: int
    tokens: int


def largest_batch(plan: DatasetPlan) -> Batch:
    """The batch with the most tokens."""
    found = [
        Batch(item.dataset.batch_size, (item.bucket[0] // 16) * (item.bucket[1] // 16))
        for item in plan.items
    ]
    return max(found, key=lambda batch: batch.images * batch.tokens)


def prediction(options: FinetuneOptions, batch: Batch, device: torch.device) -> Prediction:
    """The predicted peaks of a run."""
    sizes = model_sizes(options)
    half = options.mixed_precision != "no"
    recomputed = block_policies(options.recompute or "none", sizes.blocks).count("block")
    recipe, _ = find_optimizer(options.optimizer_type)
    trained = sizes.blocks * sizes.block_trained + sizes.rest_trained
    accumulates = options.gradient_accumulation_steps > 1
    wide_gradients = accumulates and training_dtype(options) == torch.float32
    wide_update = half and options.weight_update != "plain"
    in_place = not options.blocks_to_swap and not wide_update
    setting = Setting(
        compute_bytes=2 if half else 4,
        gradient_bytes=2 if half and not wide_gradients else 4,
        master=half and options.weight_update == "fp32",
        wide_update=wide_update,
        state_bytes=state_bytes(options, device),
        chunk=trained if looks_at_all(recipe) and not in_place else CHUNK,
        accumulates=accumulates,
        fused=options.fused_backward_pass,
        recomputed=recomputed,
        swapped=options.blocks_to_swap or 0,
        offloaded=options.cpu_offload_checkpointing or options.unsloth_offload_checkpointing,
        batch=batch.images,
        tokens=batch.tokens,
        # Captions have as many rows or fewer, unless they are encoded whole.
        rows=TEXT_ROWS,
        residual_bytes=2 if options.mixed_precision == "bf16" else 4,
        other_bytes=other_models(options),
        program_bytes=CPU_PROGRAM_BYTES if device.type == "cpu" else PROGRAM_BYTES,
    )
    return predict(sizes, setting)


def block_count(options: FinetuneOptions) -> int:
    """Blocks of the DiT."""
    return model_sizes(options).blocks


def model_sizes(options: FinetuneOptions) -> Sizes:
    """Counts of the model of a run, from the headers of its files."""
    shapes = _shapes(options.pretrained_model_name_or_path, options.llm_adapter_path)
    rates = options.part_rates
    live = options.trains_llm_adapter or choose_text_mode(options) == "live"
    counts = {(place, trained): 0 for place in ("block", "rest") for trained in (True, False)}
    largest = 0
    for name, shape in shapes.items():
        if name.startswith(ADAPTER) and not live:
            continue
        numbers = math.prod(shape)
        trained = bool(rates[part_of(name)])
        largest = max(largest, numbers if trained else 0)
        counts["block" if name.startswith("blocks.") else "rest", trained] += numbers
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    adapter = _adapter(shapes) if options.trains_llm_adapter else None
    return Sizes(
        blocks=blocks,
        width=shapes["x_embedder.proj.1.weight"][0],
        block_trained=counts["block", True] // blocks,
        block_frozen=counts["block", False] // blocks,
        rest_trained=counts["rest", True],
        rest_frozen=counts["rest", False],
        largest=largest,
        adapter_layers=adapter.layers if adapter else 0,
        adapter_width=adapter.width if adapter else 0,
    )


def _shapes(dit: str, adapter: str | None) -> dict[str, tuple[int, ...]]:
    return base_tensors(dit, adapter)[0].shapes


def _adapter(shapes: dict[str, tuple[int, ...]]) -> AdapterConfig:
    own = {n.removeprefix(ADAPTER): shape for n, shape in shapes.items() if n.startswith(ADAPTER)}
    return AdapterConfig.from_shapes(own)


def other_models(options: FinetuneOptions) -> int:
    """Bytes of the VAE and the text encoder where they stay, by the size of their files."""
    half = options.mixed_precision != "no"
    found = 0
    if choose_image_mode(options) == "live":
        found += _stored(options.vae) * (1 if half and not options.no_half_vae else 2)
    if choose_text_mode(options) == "live":
        found += _stored(options.qwen3) * (1 if half else 2)
    return found


def _stored(path: str) -> int:
    """Bytes of a model file, or of those in a folder; they are published in 16 bit."""
    given = Path(path)
    files = given.glob("*.safetensors") if given.is_dir() else [given]
    return sum(file.stat().st_size for file in files)


def state_bytes(options: FinetuneOptions, device: torch.device) -> float:
    """Bytes per trained number that the optimizer keeps.

    Raises `UserError` as `build_optimizer` does.
    """
    plain = options.weight_update == "plain"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    kind = names.get(training_dtype(options), "fp32") if plain else "fp32"
    return _state_bytes(
        options.optimizer_type, options.optimizer_args, options.learning_rate or 1e-4, kind, device
    )


@cache
def _state_bytes(
    kind: str, arguments: tuple[str, ...], rate: float, dtype: str, device: torch.device
) -> float:
    from anima_fast.options.run import FinetuneOptions

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    param = nn.Parameter(torch.zeros(PROBE, PROBE, dtype=dtypes[dtype], device=device))
    param.grad = torch.ones_like(param)
    options = FinetuneOptions(optimizer_type=kind, optimizer_args=arguments, learning_rate=rate)
    optimizer, _ = build_optimizer(options, _OneMatrix(param, rate))
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in state.values()]
    return sum(v.nbytes for v in values if isinstance(v, Tensor)) / param.numel()


@dataclass
class _OneMatrix:
    """A network of one matrix, as `build_optimizer` asks for it."""

    param: nn.Parameter
    rate: float

    def param_groups(self, flat: bool = True) -> list[dict]:
        return [{"params": [self.param], "lr": self.rate, "name": "probe"}]
