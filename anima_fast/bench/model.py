"""Predicted time of every op and of a training step of the 2B DiT.

An op takes the longer of moving its bytes and of multiplying on tensor cores, plus a launch:

    t = launch + max(bytes / (share · bandwidth), flops / (share · peak))

Bytes and flops are the registry's (`Op.cost`), each tensor touched once. The three constants below
are assumptions until a card has been measured. `step.py` says how often each op runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anima_fast.bench.step import (
    PARAMETER_OPS,
    POLICIES,
    REAL,
    TEXT_ROWS,
    lora_parameters,
    memory,
    step_flops,
    step_time,
)
from anima_fast.kernels.op import Cost, Op, Sizes
from anima_fast.kernels.registry import OPS
from anima_fast.measure.cards import Card

# Assumed: what a good kernel reaches of the data sheet, and what a launch costs in a queue that the
# processor keeps filled.
BANDWIDTH_SHARE, TENSOR_SHARE, LAUNCH_S = 0.85, 0.75, 4e-6


@dataclass(frozen=True)
class Rates:
    """What a card reaches: bytes a second, tensor-core operations a second, seconds a launch."""

    bandwidth: float
    tensor: float
    launch_s: float = LAUNCH_S

    @classmethod
    def of(cls, card: Card) -> Rates:
        """The assumed share of a card's data sheet."""
        return cls(
            card.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE, card.bf16_tflops * 1e12 * TENSOR_SHARE
        )

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """Of one call; 0 for one that does nothing."""
        if not bytes_moved and not flops:
            return 0.0
        return self.launch_s + max(bytes_moved / self.bandwidth, flops / self.tensor)

    def bound(self, bytes_moved: float, flops: float) -> str:
        """What such a call waits for: launch, memory or compute."""
        memory, compute = bytes_moved / self.bandwidth, flops / self.tensor
        if max(memory, compute) < self.launch_s:
            return "launch"
        return "memory" if memory >= compute else "compute"


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
    rates: Rates, *, tokens: int, batch: int = 1, rank: int = 32, ops: Mapping[str, Op] = OPS
) -> list[OpTime]:
    """Every op at each of its real shapes; activations in 16 bit, adapter states in 32."""
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
            found.append(
                OpTime(
                    op=op.name,
                    label=label,
                    sizes=sizes,
                    forward_s=rates.seconds(cost.forward_bytes, cost.forward_flops),
                    backward_s=rates.seconds(cost.backward_bytes, cost.backward_flops),
                    bound=rates.bound(cost.forward_bytes, cost.forward_flops),
                    cost=cost,
                )
            )
    return found


def prediction(card: Card, rates: Rates, *, tokens: int, batch: int, rank: int) -> dict[str, Any]:
    """Everything `anima-fast bench model` prints, as plain values; times in seconds."""
    times = op_times(rates, tokens=tokens, batch=batch, rank=rank)
    return {
        "card": card.title,
        "run": {"tokens": tokens, "batch": batch, "rank": rank},
        "rates": {
            "bandwidth_gb_s": rates.bandwidth / 1e9,
            "tensor_tflops": rates.tensor / 1e12,
            "launch_us": rates.launch_s * 1e6,
        },
        "ops": [_op_record(time) for time in times],
        "steps": list(_step_records(card, times, tokens=tokens, batch=batch, rank=rank)),
    }


def _op_record(time: OpTime) -> dict[str, Any]:
    cost = time.cost
    return {
        "op": time.op,
        "label": time.label,
        "sizes": time.sizes,
        "forward_s": time.forward_s,
        "backward_s": time.backward_s,
        "bound": time.bound,
        "forward_gb": cost.forward_bytes / 1e9,
        "backward_gb": cost.backward_bytes / 1e9,
        "forward_gflop": cost.forward_flops / 1e9,
        "backward_gflop": cost.backward_flops / 1e9,
    }


def _step_records(
    card: Card, times: Sequence[OpTime], *, tokens: int, batch: int, rank: int
) -> Iterator[dict[str, Any]]:
    useful = step_flops(REAL, tokens, batch, rank, TEXT_ROWS)
    for policy in POLICIES:
        step = step_time(times, policy)
        need = memory(policy, tokens=tokens, batch=batch, rank=rank)
        yield {
            "recompute": policy,
            "seconds": step.seconds,
            "forward_s": step.forward_s,
            "backward_s": step.backward_s,
            "recompute_s": step.recompute_s,
            "other_s": step.other_s,
            "mfu": useful / (step.seconds * card.bf16_tflops * 1e12),
            "missing": list(step.missing),
            "memory_gib": {
                "weights": need.weights,
                "saved": need.saved,
                "workspace": need.workspace,
                "adapters": need.adapters,
                "context": need.context,
                "total": need.total,
            },
            "fits": need.fits(card.memory_gib),
        }
