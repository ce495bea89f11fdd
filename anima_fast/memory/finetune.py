"""Predicted peak memory of full fine-tuning, from shapes and settings alone.

    device = weights + masters + optimizer state
             + the larger of   backward: activations and gradients
                               update:   gradients and the float32 copies of a chunk

Without accumulation, activations shrink as gradients grow, so the larger of the two counts; with
it, or with gradients of earlier micro-batches, both. A fused backward pass has one gradient and
one update inside backward. Of swapped blocks two have their weights on the device, everything else
of them is in host memory.

Weights, gradients and state are exact; activations are counted units (below) at the published
widths; workspace is assumed and has not been measured on a card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from anima_fast.adapters.names import ADAPTER
from anima_fast.memory.plan import (
    PROGRAM_BYTES,
    WORKSPACE_UNITS,
    Asks,
    Item,
    LargestBatch,
    Phase,
    Prediction,
    other_models,
    program_bytes,
)
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.llm_adapter import AdapterConfig
from anima_fast.models.recompute import block_policies
from anima_fast.options.finetune import part_of

if TYPE_CHECKING:
    from anima_fast.memory.plan import Options
    from anima_fast.options.run import FinetuneOptions

# Kept by the eager block with all weights trained, in units of one [B, L, D] and one [B, S, D]
# tensor of the compute dtype, by its bytes: counted by tests/test_memory_plan.py.
TOKEN_UNITS = {2: 44.3, 4: 32.2}
ROW_UNITS = {2: 6.5, 4: 4.5}
# The same of one layer of the LLM adapter, in units of [B, S, its width].
ADAPTER_UNITS = {2: 43.6, 4: 36.3}
# Assumed: what the layers around the blocks keep.
OUTSIDE_UNITS = 8.0
# Assumed: temporaries of an optimizer's step, per number.
STEP_BYTES = 4
# The line of a plan for what grows and shrinks within a step.
MOVING = "gradients, activations and workspace"
REMEDIES: tuple[dict, ...] = (
    {"gradient_checkpointing": True, "recompute": "block"},
    {"llm_adapter_lr": 0.0},
    {"optimizer_type": "AdamW8bit", "optimizer_args": ()},
    {"full_bf16": True, "weight_update": "stochastic"},
    {"fused_backward_pass": True},
    {"optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",)},
)


@dataclass(frozen=True)
class Sizes:
    """Counts of numbers (not bytes) of a model, by where they are and whether they are trained."""

    blocks: int
    width: int
    block_trained: int
    block_frozen: int
    # Outside of the blocks, with the LLM adapter when it is trained.
    rest_trained: int
    rest_frozen: int
    # Of one trained tensor.
    largest: int
    # Layers and width of the LLM adapter, 0 layers when it is frozen.
    adapter_layers: int = 0
    adapter_width: int = 0

    @property
    def trained(self) -> int:
        """All that are trained."""
        return self.blocks * self.block_trained + self.rest_trained


@dataclass(frozen=True)
class Setting:
    """What the options decide.

    Attributes:
        compute_bytes, gradient_bytes: of one number.
        master: a float32 master beside 16-bit weights.
        wide_update: the update has float32 copies of 16-bit weights and gradients.
        state_bytes: of the optimizer, per trained number.
        chunk: numbers that are updated together.
        accumulates: gradients of several micro-batches add up.
        fused: each weight is updated inside backward.
        recomputed, swapped: blocks of that kind; swapped ones are recomputed too.
        offloaded: inputs of recomputed blocks wait in host memory.
        batch, tokens, rows: B, L and S of the largest batch.
        residual_bytes: of a number between blocks.
        other_bytes: further models that stay on the device.
        program_bytes: of the program itself, in host memory.
    """

    compute_bytes: int
    gradient_bytes: int
    master: bool
    wide_update: bool
    state_bytes: float
    chunk: int
    accumulates: bool
    fused: bool
    recomputed: int
    swapped: int
    offloaded: bool
    batch: int
    tokens: int
    rows: int
    residual_bytes: int
    other_bytes: int = 0
    program_bytes: int = PROGRAM_BYTES


@dataclass(frozen=True)
class FinetuneNeeds:
    """The prediction for any options, with the same model and data on the same device.

    Attributes:
        batch, device: of the run.
        shapes: of the DiT's and the LLM adapter's tensors, the latter with their prefix.
        asks: see `Asks`.
        looks_at_all: whether the optimizer may need all weights in one step.
        chunk: numbers that are updated together by one that does not.
    """

    batch: LargestBatch
    device: torch.device
    shapes: Mapping[str, tuple[int, ...]]
    asks: Asks
    looks_at_all: Callable[[FinetuneOptions], bool]
    chunk: int
    subject: str = "full fine-tuning"
    remedies: tuple[dict, ...] = REMEDIES
    # The last one excludes another.
    together: tuple[dict, ...] = REMEDIES[:-1]
    last_resort: str = (
        "use a smaller resolution or batch size, or train a LoRA (`anima-fast train`)"
    )

    @property
    def blocks(self) -> int:
        """Of the DiT."""
        return len({name.split(".")[1] for name in self.shapes if name.startswith("blocks.")})

    def __call__(self, options: Options) -> Prediction:
        """The predicted peaks."""
        run = cast("FinetuneOptions", options)
        return predict(self.sizes(run), self.setting(run))

    def allows(self, before: Options, after: Options) -> bool:
        """Whether the optimizer can work the way that the options ask for."""
        run = cast("FinetuneOptions", after)
        one_by_one = run.fused_backward_pass or run.blocks_to_swap
        return not (one_by_one and self.looks_at_all(run))

    def sizes(self, options: FinetuneOptions) -> Sizes:
        """Counts of the model, by what is trained."""
        live = options.trains_llm_adapter or self.asks.modes(options).text == "live"
        return model_sizes(options, self.shapes, adapter_stays=live)

    def setting(self, options: FinetuneOptions) -> Setting:
        """What the options decide."""
        sizes, half = self.sizes(options), options.mixed_precision != "no"
        recomputed = block_policies(options.recompute or "none", sizes.blocks).count("block")
        accumulates = options.gradient_accumulation_steps > 1
        wide_gradients = accumulates and not (options.full_bf16 or options.full_fp16)
        wide_update = half and options.weight_update != "plain"
        in_place = not options.blocks_to_swap and not wide_update
        whole = self.looks_at_all(options) and not in_place
        return Setting(
            compute_bytes=2 if half else 4,
            gradient_bytes=2 if half and not wide_gradients else 4,
            master=half and options.weight_update == "fp32",
            wide_update=wide_update,
            state_bytes=self.asks.state_bytes(options),
            chunk=sizes.trained if whole else self.chunk,
            accumulates=accumulates,
            fused=options.fused_backward_pass,
            recomputed=recomputed,
            swapped=options.blocks_to_swap or 0,
            offloaded=options.cpu_offload_checkpointing or options.unsloth_offload_checkpointing,
            batch=self.batch.images,
            tokens=self.batch.tokens,
            rows=TEXT_ROWS,
            residual_bytes=2 if options.mixed_precision == "bf16" else 4,
            other_bytes=other_models(options, self.asks.modes(options)),
            program_bytes=program_bytes(self.device),
        )


def model_sizes(
    options: FinetuneOptions, shapes: Mapping[str, tuple[int, ...]], *, adapter_stays: bool
) -> Sizes:
    """Counts of a model by what the options train.

    Args:
        options: give the rate of each part.
        shapes: of `FinetuneNeeds`.
        adapter_stays: whether the LLM adapter is in memory while the DiT is trained.
    """
    rates = options.part_rates
    counts = {(place, trained): 0 for place in ("block", "rest") for trained in (True, False)}
    largest = 0
    for name, shape in shapes.items():
        if name.startswith(ADAPTER) and not adapter_stays:
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


def _adapter(shapes: Mapping[str, tuple[int, ...]]) -> AdapterConfig:
    own = {n.removeprefix(ADAPTER): shape for n, shape in shapes.items() if n.startswith(ADAPTER)}
    return AdapterConfig.from_shapes(own)


def predict(sizes: Sizes, setting: Setting) -> Prediction:
    """The peaks of a run; see the module docstring."""
    s = setting
    resident = sizes.blocks - s.swapped
    trained = resident * sizes.block_trained + sizes.rest_trained
    frozen = resident * sizes.block_frozen + sizes.rest_frozen
    visiting = min(2, s.swapped) * (sizes.block_trained + sizes.block_frozen)
    kept, inside = _activations(sizes, s)
    activations, workspace = Item("activations", kept, MOVING), Item("workspace", inside, MOVING)
    gradients = Item("gradients", _gradients(sizes, s, trained), MOVING)
    update = Item("update", _update(sizes, s), MOVING)

    def phase(*moving: Item) -> Phase:
        return Phase(
            "training",
            (
                Item("weights", (trained + frozen + visiting) * s.compute_bytes, "weights"),
                Item("masters", 4 * trained if s.master else 0, "float32 copies of the weights"),
                Item("state", int(trained * s.state_bytes), "optimizer state"),
                *moving,
                Item("other", s.other_bytes, "other models"),
            ),
        )

    if s.fused:
        phases = [phase(activations, workspace, gradients, update)]
    elif s.accumulates:
        phases = [phase(activations, workspace, gradients), phase(gradients, update)]
    else:
        # Activations shrink as gradients grow: the beginning and the end of backward.
        phases = [phase(activations, workspace), phase(gradients, workspace)]
        phases.append(phase(gradients, update))
    return Prediction(tuple(phases), s.program_bytes + _host(sizes, s))


def _gradients(sizes: Sizes, s: Setting, trained: int) -> int:
    """Of the weights on the device, and of a swapped block until they are in host memory."""
    own = (sizes.largest if s.fused else trained) * s.gradient_bytes
    return own + (sizes.block_trained * s.compute_bytes if s.swapped else 0)


def _activations(sizes: Sizes, s: Setting) -> tuple[int, int]:
    """Kept from forward to backward, and inside one block's backward."""
    unit = s.batch * s.tokens * sizes.width * s.compute_bytes
    row_unit = s.batch * s.rows * sizes.width * s.compute_bytes
    block = TOKEN_UNITS[s.compute_bytes] * unit + ROW_UNITS[s.compute_bytes] * row_unit
    recomputed = min(sizes.blocks, s.recomputed + s.swapped)
    kept = (sizes.blocks - recomputed) * block
    if not s.offloaded:
        kept += recomputed * _input(sizes, s)
    adapter = sizes.adapter_layers * s.batch * s.rows * sizes.adapter_width * s.compute_bytes
    kept += ADAPTER_UNITS[s.compute_bytes] * adapter
    workspace = (WORKSPACE_UNITS + OUTSIDE_UNITS) * unit + (block if recomputed else 0)
    return int(kept), int(workspace)


def _input(sizes: Sizes, s: Setting) -> int:
    """What a recomputed block keeps."""
    return s.batch * s.tokens * sizes.width * s.residual_bytes


def _update(sizes: Sizes, s: Setting) -> int:
    """Copies and temporaries of the numbers that are updated together."""
    together = sizes.largest if s.fused else min(max(s.chunk, sizes.largest), sizes.trained)
    each = float(STEP_BYTES)
    if s.wide_update:
        each += 4 if s.gradient_bytes < 4 else 0
        each += 4 if not s.master or s.swapped else 0
    if s.swapped:
        each += s.state_bytes + s.gradient_bytes
    return int(together * each)


def _host(sizes: Sizes, s: Setting) -> int:
    """Swapped blocks with all that belongs to them, and offloaded inputs."""
    each = s.state_bytes + (4 if s.master else 0) + (0 if s.fused else s.gradient_bytes)
    whole = (sizes.block_trained + sizes.block_frozen) * s.compute_bytes
    swapped = s.swapped * (whole + sizes.block_trained * each)
    inputs = s.recomputed * _input(sizes, s) if s.offloaded else 0
    return int(swapped + inputs)
