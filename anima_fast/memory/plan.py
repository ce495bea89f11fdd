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

from dataclasses import dataclass

GIB = 2**30
# Kept by the eager block with all weights trained, in units of one [B, L, D] and one [B, S, D]
# tensor of the compute dtype, by its bytes: counted by tests/test_memory_plan.py.
TOKEN_UNITS = {2: 44.3, 4: 32.2}
ROW_UNITS = {2: 6.5, 4: 4.5}
# The same of one layer of the LLM adapter, in units of [B, S, its width].
ADAPTER_UNITS = {2: 43.6, 4: 36.3}
# Assumed: gradients inside one block's backward, and what the layers around the blocks keep.
WORKSPACE_UNITS, OUTSIDE_UNITS = 14.0, 8.0
# Assumed: temporaries of an optimizer's step, per number.
STEP_BYTES = 4
# Assumed: what the program itself takes of host memory, and of a card (context, libraries).
PROGRAM_BYTES, CONTEXT_BYTES = 3 * GIB, int(0.8 * GIB)
# The first without a card, whose libraries are most of it: 0.5 GiB at the end of a tiny run, of
# which the greater part is taken before free memory is measured.
CPU_PROGRAM_BYTES = GIB // 2
# Assumed: the part of free memory that can be used before fragments get in the way.
USABLE_SHARE = 0.95


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
class Prediction:
    """Bytes by what takes them; `device` and `host` are the peaks."""

    weights: int
    masters: int
    state: int
    gradients: int
    activations: int
    workspace: int
    update: int
    other: int
    host: int
    both: bool
    fused: bool

    @property
    def backward(self) -> int:
        """Activations and gradients at their largest."""
        if self.fused:
            return self.activations + self.workspace + self.gradients + self.update
        if self.both:
            return self.activations + self.workspace + self.gradients
        return max(self.activations, self.gradients) + self.workspace

    @property
    def device(self) -> int:
        """Peak on the device."""
        fixed = self.weights + self.masters + self.state + self.other
        return fixed + max(self.backward, 0 if self.fused else self.gradients + self.update)

    def rows(self) -> list[tuple[str, int]]:
        """What the peak on the device is made of, for people."""
        moving = self.device - self.weights - self.masters - self.state - self.other
        return [
            ("weights", self.weights),
            ("float32 copies of the weights", self.masters),
            ("optimizer state", self.state),
            ("gradients, activations and workspace", moving),
            ("other models", self.other),
        ]


def predict(sizes: Sizes, setting: Setting) -> Prediction:
    """The peaks of a run; see the module docstring."""
    s = setting
    resident = sizes.blocks - s.swapped
    trained = resident * sizes.block_trained + sizes.rest_trained
    frozen = resident * sizes.block_frozen + sizes.rest_frozen
    visiting = min(2, s.swapped) * (sizes.block_trained + sizes.block_frozen)
    gradients = (sizes.largest if s.fused else trained) * s.gradient_bytes
    if s.swapped:
        # Those of a swapped block, until they are sent to host memory.
        gradients += sizes.block_trained * s.compute_bytes
    activations, workspace = _activations(sizes, s)
    return Prediction(
        weights=(trained + frozen + visiting) * s.compute_bytes,
        masters=4 * trained if s.master else 0,
        state=int(trained * s.state_bytes),
        gradients=gradients,
        activations=activations,
        workspace=workspace,
        update=_update(sizes, s),
        other=s.other_bytes,
        host=s.program_bytes + _host(sizes, s),
        both=s.accumulates,
        fused=s.fused,
    )


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
    trained = sizes.blocks * sizes.block_trained + sizes.rest_trained
    together = sizes.largest if s.fused else min(max(s.chunk, sizes.largest), trained)
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
