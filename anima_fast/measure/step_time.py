"""Predicted time of every op, and of one LoRA training step of the published DiT in fused blocks.

Bytes and flops of an op are the registry's (`Op.cost`), each tensor touched once. A step adds them
up by the sequence of the fused block: forward, backward, and what backward runs again. With short
float16 sums (kernels/sums.py) the products of layers and attention take a share of their time, on
cards that are faster then; what waits for memory stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anima_fast.kernels.op import Cost, Op, Sizes
from anima_fast.kernels.registry import OPS
from anima_fast.measure.rates import Rates
from anima_fast.models.dit_config import PUBLISHED, DitConfig

# Rows of an average caption, as the ops' real shapes have them.
TEXT_ROWS = 96
# Ops over all adapter parameters: one shape, of the run's rank, in float32.
PARAMETER_OPS = {"adamw": "N"}
# Assumed: what kernels with short float16 sums reach of the rate of float16 sums, forward and
# backward, against what they reach of the other with float32 sums. That is half of 1.75, 1.3 and
# 1.6 times where the rate is doubled. A Triton product of 2048³ has 1.71 times on an RTX 4060
# (https://github.com/triton-lang/triton/issues/10851); logits keep float32 sums, so that in
# attention one of two products is short, and five of seven backward.
SHORT_SHARES = {"lora_linear_short": (0.875, 0.875), "attention_short": (0.65, 0.8)}


@dataclass(frozen=True)
class OpTime:
    """Predicted seconds of one op at one real shape; `bound` is that of its forward."""

    op: str
    label: str
    sizes: dict[str, int]
    forward_s: float
    backward_s: float
    bound: str
    cost: Cost


def sized(sizes: Sizes, *, batch: int, rank: int) -> dict[str, int]:
    """Registry sizes with the letters of the legend that a run chooses.

    B batch, M the tokens of all samples (of an op that has no B), R rank.
    """
    changed = {name: size * batch if name in "BM" else size for name, size in sizes.items()}
    if "R" in sizes:
        changed["R"] = rank
    return changed


def op_times(
    rates: Rates,
    *,
    tokens: int,
    batch: int = 1,
    rank: int = 32,
    float16_sums: float = 1.0,
    ops: Mapping[str, Op] = OPS,
) -> list[OpTime]:
    """Every op at each of its real shapes; activations in 16 bit, adapter states in 32.

    Args:
        rates: with float32 sums.
        tokens, batch, rank: L, B and R.
        float16_sums: of the card (`Card.float16_sums`), for the ops of `SHORT_SHARES`.
        ops: of the registry.
    """
    found = []
    for op in ops.values():
        shapes = dict(op.real_shapes(tokens))
        if op.name in PARAMETER_OPS:
            # The registry's shape has a rank of its own.
            sizes = next(iter(shapes.values()))
            shapes = {"": {**sizes, PARAMETER_OPS[op.name]: lora_parameters(rank)}}
        itemsize = 4 if op.name in PARAMETER_OPS else 2
        for label, real in shapes.items():
            sizes = sized(real, batch=batch, rank=rank)
            cost = op.cost(sizes, itemsize)
            forward, backward = _flops(op, sizes, cost, float16_sums)
            found.append(
                OpTime(
                    op=op.name,
                    label=label,
                    sizes=sizes,
                    forward_s=rates.seconds(cost.forward_bytes, forward),
                    backward_s=rates.seconds(cost.backward_bytes, backward),
                    bound=rates.bound(cost.forward_bytes, forward),
                    cost=cost,
                )
            )
    return found


def _flops(op: Op, sizes: Sizes, cost: Cost, float16_sums: float) -> tuple[float, float]:
    """Operations forward and backward that take as long with float32 sums."""
    counts = cost.forward_flops, cost.backward_flops
    if op.name not in SHORT_SHARES:
        return counts
    # Products of adapters are narrow and keep float32 sums.
    plain = op.cost({**sizes, "R": 0}, 2)
    shorts = plain.forward_flops, plain.backward_flops
    # Where short sums are not faster they are not taken.
    faster = [max(1.0, share * float16_sums) for share in SHORT_SHARES[op.name]]
    forward, backward = (
        count - short + short / times
        for count, short, times in zip(counts, shorts, faster, strict=True)
    )
    return forward, backward


@dataclass(frozen=True)
class OpUse:
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


# The sequence of a block (models/block.py). Backward recomputes the three normed inputs, the normed
# queries and keys, and GELU: adapter gradients and attention need them, and they are not kept.
BLOCK = (
    OpUse("layernorm_modulate", "", 1, again=3),
    OpUse("gate_residual_layernorm_modulate", "", 2),
    OpUse("gate_residual", "", 1),
    OpUse("qk_norm_rope", "self", 1, again=1),
    OpUse("qk_norm_rope", "cross q", 1, again=1),
    OpUse("qk_norm_rope", "cross k", 1, again=1),
    OpUse("attention", "self", 1),
    OpUse("attention", "cross", 1),
    OpUse("lora_linear", "qkv", 1),
    # Both outputs and the query of cross attention are D to D.
    OpUse("lora_linear", "out", 3),
    OpUse("lora_linear", "text kv", 1),
    OpUse("lora_linear", "up", 1, mlp_again=1),
    OpUse("lora_linear", "down", 1),
    OpUse("gelu", "", 1, again=1),
)
SHORT_BLOCK = tuple(
    replace(use, op=short) if (short := f"{use.op}_short") in SHORT_SHARES else use for use in BLOCK
)
STEP = (OpUse("layernorm_modulate", "", 1), OpUse("adamw", "", 1), OpUse("flow_loss", "", 1))


def lora_parameters(rank: int) -> int:
    """Parameters of adapters of `rank` on the ten linear layers of each published block."""
    d, h, c = PUBLISHED.model_channels, PUBLISHED.mlp_hidden, PUBLISHED.context_dim
    return PUBLISHED.num_blocks * rank * (6 * (d + d) + 2 * (c + d) + 2 * (d + h))


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
    block: Sequence[OpUse] = BLOCK,
    step: Sequence[OpUse] = STEP,
    blocks: int = PUBLISHED.num_blocks,
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
