"""One training step of the 2B DiT: what runs how often, and what it keeps in memory.

The sequence is the fused block's, forward, backward and what backward runs again. Memory counts
what a block saves in units of one [B, L, D] tensor of 16 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anima_fast.models.dit_config import DitConfig

if TYPE_CHECKING:
    from anima_fast.bench.model import OpTime

# The published model.
REAL = DitConfig(
    model_channels=2048, num_blocks=28, num_heads=16, head_dim=128, context_dim=1024,
    adaln_rank=256, mlp_hidden=8192,
)  # fmt: skip
BLOCKS, WIDTH, HIDDEN, CONTEXT = 28, 2048, 8192, 1024
# Rows of a middling caption, as the ops' real shapes have them.
TEXT_ROWS = 96
# Without the LLM adapter, whose output is cached.
PARAMETERS = 1_956_405_248
POLICIES = ("none", "mlp", "block")
# Saved per block, by policy, counted by tests/test_block.py at L = 1024, S = 96, rank 32; the
# fraction is text keys and values, log-sum-exps, the adapters' products and modulation.
SAVED_UNITS = {"none": 13.53, "mlp": 9.51, "block": 1.18}
# Assumed peak inside one block's backward: GELU, its gradient and the pre-activation's (4 each),
# the normed input and the residual gradient. What a policy computes again comes on top.
WORKSPACE_UNITS = 14.0
# Assumed: CUDA context, libraries, fragments.
CONTEXT_GIB, USABLE_SHARE = 0.8, 0.95
# Parameter, gradient and two moments, float32.
STATE_BYTES = 16


@dataclass(frozen=True)
class Use:
    """How often one real shape of an op runs.

    Attributes:
        op, label: the registry's name, and the key of `Op.real_shapes` ("" in `PARAMETER_OPS`).
        count: forward and backward, per block (or, in `STEP`, per step).
        again: forward calls inside backward, whatever the policy: cheap results are not kept.
        mlp_again: forward calls that policy mlp adds.
    """

    op: str
    label: str
    count: int = 1
    again: int = 0
    mlp_again: int = 0


# The sequence of a block (models/block.py). Backward computes the three
# normed inputs, the normed queries and keys and GELU again: all are needed for adapter gradients
# and attention, none is kept.
BLOCK = (
    Use("layernorm_modulate", "", 1, again=3),
    Use("gate_residual_layernorm_modulate", "", 2),
    Use("gate_residual", "", 1),
    Use("qk_norm_rope", "self", 1, again=1),
    Use("qk_norm_rope", "cross q", 1, again=1),
    Use("qk_norm_rope", "cross k", 1, again=1),
    Use("attention", "self", 1),
    Use("attention", "cross", 1),
    Use("lora_linear", "qkv", 1),
    # Both outputs and the query of cross attention are D to D.
    Use("lora_linear", "out", 3),
    Use("lora_linear", "text kv", 1),
    Use("lora_linear", "up", 1, mlp_again=1),
    Use("lora_linear", "down", 1),
    Use("gelu", "", 1, again=1),
)
STEP = (Use("layernorm_modulate", "", 1), Use("adamw", "", 1), Use("flow_loss", "", 1))
# Ops over all adapter parameters: one shape, of the run's rank, in float32.
PARAMETER_OPS = {"adamw": "N"}


def lora_parameters(rank: int) -> int:
    """Parameters of adapters of `rank` on the ten linear layers of each block."""
    layers = 6 * (WIDTH + WIDTH) + 2 * (CONTEXT + WIDTH) + 2 * (WIDTH + HIDDEN)
    return BLOCKS * rank * layers


def step_flops(config: DitConfig, tokens: int, batch: int, rank: int, text: int) -> float:
    """Operations (two per multiply-add) that a LoRA step of the blocks needs, none twice.

    Frozen layers: the product and its activation's gradient; adapters: also both weights'
    gradients; attention: two products forward, four backward, text rows without padding. No
    gradient goes below block 0's normed input or below the text. Modulation, embeddings and the
    final layer, far below a percent at real sizes, are left out.
    """
    d, h, c = config.model_channels, config.mlp_hidden, config.context_dim
    image, texts = [(d, d)] * 6 + [(d, h), (h, d)], [(c, d)] * 2
    block = tokens * sum(2 * a * b + 3 * rank * (a + b) for a, b in image)
    block += text * sum(a * b + rank * (2 * a + 3 * b) for a, b in texts)
    block += 6 * tokens * (tokens + text) * d
    first = 3 * tokens * d * (d + rank)
    return 2.0 * batch * (config.num_blocks * block - first)


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a training step.

    `missing` names uses whose op or shape the registry lacks: the time is then too short.
    """

    policy: str
    forward_s: float
    backward_s: float
    recompute_s: float
    other_s: float
    missing: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.forward_s + self.backward_s + self.recompute_s + self.other_s


def step_time(
    times: Sequence[OpTime],
    policy: str,
    *,
    block: Sequence[Use] = BLOCK,
    step: Sequence[Use] = STEP,
    blocks: int = BLOCKS,
) -> StepTime:
    """Add up a step from the times of its ops.

    Args:
        times: of `op_times`.
        policy: none, mlp (up-projection again) or block (the whole forward again).
        block, step: what runs in each block, and once a step.
        blocks: how many.
    """
    known = {(time.op, time.label): time for time in times}
    uses = [use for use in block if (use.op, use.label) in known]
    once = [use for use in step if (use.op, use.label) in known]
    forward = backward = recompute = 0.0
    for use in uses:
        time = known[use.op, use.label]
        again = use.again
        if policy == "mlp":
            again += use.mlp_again
        if policy == "block":
            again += use.count
        forward += use.count * time.forward_s
        backward += use.count * time.backward_s
        recompute += again * time.forward_s
    other = sum(
        use.count * (known[use.op, use.label].forward_s + known[use.op, use.label].backward_s)
        for use in once
    )
    missing = [f"{u.op} {u.label}".strip() for u in (*block, *step) if (u.op, u.label) not in known]
    return StepTime(
        policy=policy,
        forward_s=blocks * forward,
        backward_s=blocks * backward,
        recompute_s=blocks * recompute,
        other_s=other,
        missing=tuple(dict.fromkeys(missing)),
    )


@dataclass(frozen=True)
class Memory:
    """Predicted peak of a training step, GiB, by what takes it."""

    policy: str
    weights: float
    saved: float
    workspace: float
    adapters: float
    context: float = CONTEXT_GIB

    @property
    def total(self) -> float:
        """GiB."""
        return self.weights + self.saved + self.workspace + self.adapters + self.context

    def fits(self, card_gib: float) -> bool:
        """Whether a card of that size holds it, with a margin."""
        return self.total <= USABLE_SHARE * card_gib


def memory(policy: str, *, tokens: int, batch: int = 1, rank: int = 32) -> Memory:
    """Memory of a step under a recompute policy of `POLICIES`."""
    unit = batch * tokens * WIDTH * 2 / 2**30
    again = SAVED_UNITS["none"] - SAVED_UNITS[policy]
    return Memory(
        policy=policy,
        weights=PARAMETERS * 2 / 2**30,
        saved=BLOCKS * SAVED_UNITS[policy] * unit,
        workspace=(WORKSPACE_UNITS + again) * unit,
        adapters=lora_parameters(rank) * STATE_BYTES / 2**30,
    )
