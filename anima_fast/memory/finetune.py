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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from anima_fast.adapters.names import ADAPTER
from anima_fast.memory.offload import SaverSettings
from anima_fast.memory.plan import WORKSPACE_UNITS, Item, Needs, Phase, Prediction, stored_bytes
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.llm_adapter import AdapterConfig
from anima_fast.options.finetune import part_of

if TYPE_CHECKING:
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
    def block(self) -> int:
        """Of one block."""
        return self.block_trained + self.block_frozen

    @property
    def trained(self) -> int:
        """All that are trained."""
        return self.blocks * self.block_trained + self.rest_trained


class Number(NamedTuple):
    """Bytes of one trained number."""

    weight: int
    # Of 16-bit weights in float32, kept by `weight_update` fp32.
    master: int
    gradient: int
    state: float


@dataclass(frozen=True)
class FinetuneNeeds(Needs["FinetuneOptions"]):
    """The prediction for full fine-tuning.

    Attributes:
        shapes: of the DiT's and the LLM adapter's tensors, the latter with their prefix.
        looks_at_all: whether the optimizer may need all weights in one step.
        chunk: numbers that are updated together by one that does not.
    """

    shapes: Mapping[str, tuple[int, ...]]
    looks_at_all: Callable[[FinetuneOptions], bool]
    chunk: int
    subject = "full fine-tuning"
    remedies = REMEDIES
    # The last one excludes another.
    together = REMEDIES[:-1]
    last_resort = "use a smaller resolution or batch size, or train a LoRA (`anima-fast train`)"

    @property
    def blocks(self) -> int:
        """Of the DiT."""
        return count_blocks(self.shapes)

    def allows(self, before: FinetuneOptions, after: FinetuneOptions) -> bool:
        """Whether the optimizer can work the way that the options ask for."""
        one_by_one = after.fused_backward_pass or after.blocks_to_swap
        return not (one_by_one and self.looks_at_all(after))

    def __call__(self, options: FinetuneOptions) -> Prediction:
        """The predicted peaks; see the module docstring."""
        sizes, number = self.sizes(options), self.number(options)
        swapped = options.blocks_to_swap or 0
        trained = (sizes.blocks - swapped) * sizes.block_trained + sizes.rest_trained
        frozen = (sizes.blocks - swapped) * sizes.block_frozen + sizes.rest_frozen
        here = trained + frozen + min(2, swapped) * sizes.block
        kept, inside = self._activations(options, sizes, number)
        activations, workspace = (
            Item("activations", kept, MOVING),
            Item("workspace", inside, MOVING),
        )
        gradients = Item("gradients", _gradients(options, sizes, number, trained), MOVING)
        update = Item("update", self._update(options, sizes, number), MOVING)
        if options.fused_backward_pass:
            moments = [[activations, workspace, gradients, update]]
        elif options.gradient_accumulation_steps > 1:
            moments = [[activations, workspace, gradients], [gradients, update]]
        else:
            # Activations shrink as gradients grow: the beginning and the end of backward.
            moments = [[activations, workspace], [gradients, workspace], [gradients, update]]
        always = (
            Item("weights", here * number.weight, "weights"),
            Item("masters", trained * number.master, "float32 copies of the weights"),
            Item("state", int(trained * number.state), "optimizer state"),
        )
        other = Item("other", self._other_models(options), "other models")
        phases = [Phase("training", (*always, *moving, other)) for moving in moments]
        return Prediction(tuple(phases), self._host(options, sizes, number))

    def sizes(self, options: FinetuneOptions) -> Sizes:
        """Counts of the model, by what is trained."""
        live = options.trains_llm_adapter or self.modes(options).text == "live"
        return model_sizes(options, self.shapes, adapter_stays=live)

    def number(self, options: FinetuneOptions) -> Number:
        """Bytes of a trained number."""
        half = options.mixed_precision != "no"
        accumulates = options.gradient_accumulation_steps > 1
        wide_gradients = accumulates and not (options.full_bf16 or options.full_fp16)
        return Number(
            weight=2 if half else 4,
            master=4 if half and options.weight_update == "fp32" else 0,
            gradient=2 if half and not wide_gradients else 4,
            state=self.state_bytes(options),
        )

    def _activations(self, options: FinetuneOptions, sizes: Sizes, n: Number) -> tuple[int, int]:
        """Kept from forward to backward, and inside one block's backward."""
        unit = self.batch.images * self.batch.tokens * sizes.width * n.weight
        rows = self.batch.images * TEXT_ROWS * n.weight
        block = TOKEN_UNITS[n.weight] * unit + ROW_UNITS[n.weight] * rows * sizes.width
        recomputed = min(sizes.blocks, _recomputed(options, sizes) + (options.blocks_to_swap or 0))
        kept = (sizes.blocks - recomputed) * block
        if not SaverSettings.of(options).offload:
            kept += recomputed * self._input(options, sizes)
        kept += ADAPTER_UNITS[n.weight] * sizes.adapter_layers * rows * sizes.adapter_width
        workspace = (WORKSPACE_UNITS + OUTSIDE_UNITS) * unit + (block if recomputed else 0)
        return int(kept), int(workspace)

    def _input(self, options: FinetuneOptions, sizes: Sizes) -> int:
        """What a recomputed block keeps; between blocks float16 is too narrow."""
        each = 2 if options.mixed_precision == "bf16" else 4
        return self.batch.images * self.batch.tokens * sizes.width * each

    def _update(self, options: FinetuneOptions, sizes: Sizes, n: Number) -> int:
        """Copies and temporaries of the numbers that are updated together."""
        swapped = bool(options.blocks_to_swap)
        wide = options.mixed_precision != "no" and options.weight_update != "plain"
        in_place = not swapped and not wide
        whole = self.looks_at_all(options) and not in_place
        together = min(max(self.chunk, sizes.largest), sizes.trained)
        if options.fused_backward_pass:
            together = sizes.largest
        elif whole:
            together = sizes.trained
        each = float(STEP_BYTES)
        if wide:
            # Float32 copies of 16-bit gradients and weights.
            each += 4 if n.gradient < 4 else 0
            each += 4 if not n.master or swapped else 0
        if swapped:
            each += n.state + n.gradient
        return int(together * each)

    def _other_models(self, options: FinetuneOptions) -> int:
        """Bytes of the VAE and the text encoder where they stay, by the size of their files."""
        half, modes = options.mixed_precision != "no", self.modes(options)
        found = 0
        if modes.image == "live":
            found += stored_bytes(options.vae) * (1 if half and not options.no_half_vae else 2)
        if modes.text == "live":
            found += stored_bytes(options.qwen3) * (1 if half else 2)
        return found

    def _host(self, options: FinetuneOptions, sizes: Sizes, n: Number) -> int:
        """The program, swapped blocks with all that belongs to them, and offloaded inputs."""
        gradient = 0 if options.fused_backward_pass else n.gradient
        block = sizes.block * n.weight + sizes.block_trained * (n.state + n.master + gradient)
        swapped = (options.blocks_to_swap or 0) * block
        waiting = _recomputed(options, sizes) if SaverSettings.of(options).offload else 0
        return self.program + int(swapped + waiting * self._input(options, sizes))


def _gradients(options: FinetuneOptions, sizes: Sizes, n: Number, trained: int) -> int:
    """Of the weights on the device, and of a swapped block until they are in host memory."""
    own = (sizes.largest if options.fused_backward_pass else trained) * n.gradient
    return own + (sizes.block_trained * n.weight if options.blocks_to_swap else 0)


def _recomputed(options: FinetuneOptions, sizes: Sizes) -> int:
    """How many blocks are, without those that are swapped."""
    return SaverSettings.of(options).policies(sizes.blocks, fused=False).count("block")


def count_blocks(shapes: Iterable[str]) -> int:
    """How many blocks a DiT has, by the names of its tensors."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def model_sizes(
    options: FinetuneOptions, shapes: Mapping[str, tuple[int, ...]], *, adapter_stays: bool
) -> Sizes:
    """Counts of a model of these shapes (see `FinetuneNeeds`) by what the options train.

    `adapter_stays`: the LLM adapter is in memory while the DiT is trained.
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
    blocks = count_blocks(shapes)
    own = {n.removeprefix(ADAPTER): shape for n, shape in shapes.items() if n.startswith(ADAPTER)}
    adapter = AdapterConfig.from_shapes(own) if options.trains_llm_adapter else None
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
