"""Predicted time of every op and of a training step of the published DiT, and the memory it takes.

What `anima-fast bench model` prints: the model of time is measure/step_time.py, that of memory
memory/lora.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anima_fast.bench.tables import table
from anima_fast.measure.cards import Card
from anima_fast.measure.rates import Rates
from anima_fast.measure.step_time import (
    SHORT_BLOCK,
    TEXT_ROWS,
    OpTime,
    op_times,
    step_flops,
    step_time,
)
from anima_fast.memory.lora import published_step
from anima_fast.memory.plan import CONTEXT_GIB, GIB, USABLE_SHARE, Prediction
from anima_fast.models.dit_config import PUBLISHED
from anima_fast.models.recompute import POLICIES

_PARTS = ("weights", "saved", "workspace", "adapters", "context", "total")


def prediction(card: Card, rates: Rates, *, tokens: int, batch: int, rank: int) -> dict[str, Any]:
    """Everything `anima-fast bench model` prints, as plain values; times in seconds."""
    times = op_times(rates, tokens=tokens, batch=batch, rank=rank, float16_sums=card.float16_sums)
    return {
        "card": card.title,
        "run": {"tokens": tokens, "batch": batch, "rank": rank},
        "rates": {
            "bandwidth_gb_s": rates.bandwidth / 1e9,
            "tensor_tflops": rates.tensor / 1e12,
            "launch_us": rates.launch_s * 1e6,
            "float16_sums": card.float16_sums,
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
    useful = step_flops(PUBLISHED, tokens, batch, rank, TEXT_ROWS)
    for policy in POLICIES:
        step, short = step_time(times, policy), step_time(times, policy, block=SHORT_BLOCK)
        memory = memory_gib(published_step(policy, tokens=tokens, batch=batch, rank=rank))
        yield {
            "recompute": policy,
            "seconds": step.seconds,
            "forward_s": step.forward_s,
            "backward_s": step.backward_s,
            "recompute_s": step.recompute_s,
            "other_s": step.other_s,
            "fp16_short_s": short.seconds,
            "fp16_short_times": step.seconds / short.seconds,
            "mfu": useful / (step.seconds * card.bf16_tflops * 1e12),
            "missing": list(dict.fromkeys((*step.missing, *short.missing))),
            "memory_gib": memory,
            "fits": memory["total"] <= USABLE_SHARE * card.memory_gib,
        }


def memory_gib(need: Prediction) -> dict[str, float]:
    """Predicted GiB by what takes them, with the CUDA context, and their total."""
    parts = {
        "weights": need["weights"] / GIB,
        "saved": need["activations"] / GIB,
        "workspace": need["workspace"] / GIB,
        "adapters": (need["parameters"] + need["gradients"] + need["state"]) / GIB,
        "context": CONTEXT_GIB,
    }
    return parts | {"total": sum(parts.values())}


def prediction_text(found: Mapping[str, Any]) -> str:
    """The result of `prediction` for people: rates, ops, steps and memory."""
    rates, run = found["rates"], found["run"]
    doubled = rates["float16_sums"]
    sums = f"{doubled:g} times with float16 sums" if doubled > 1 else "float16 sums no faster"
    lines = [
        f"{found['card']}: {rates['bandwidth_gb_s']:.0f} GB/s, "
        f"{rates['tensor_tflops']:.1f} TFLOP/s ({sums}), {rates['launch_us']:.0f} us a launch"
        f" ({found['source']})",
        f"{run['tokens']} tokens, batch {run['batch']}, rank {run['rank']}, 16 bit",
        "",
    ]
    ops = [
        (
            op["op"],
            op["label"],
            f"{op['forward_s'] * 1e6:.1f}",
            f"{op['backward_s'] * 1e6:.1f}",
            f"{op['forward_gb'] * 1e3:.1f}",
            f"{op['forward_gflop']:.1f}",
            op["bound"],
        )
        for op in found["ops"]
    ]
    header = ("op", "shape", "forward us", "backward us", "forward MB", "GFLOP", "bound")
    lines += [table(header, ops, left=2), ""]
    steps = [
        (
            step["recompute"],
            f"{step['seconds']:.3f}",
            f"{step['mfu']:.0%}",
            f"{step['fp16_short_s']:.3f}",
            f"{step['fp16_short_times']:.2f}",
            *(f"{step['memory_gib'][part]:.1f}" for part in _PARTS),
            "yes" if step["fits"] else "no",
        )
        for step in found["steps"]
    ]
    columns = ("recompute", "bf16 s", "MFU", "fp16 short s", "times", *_PARTS, "fits")
    lines.append(table(columns, steps))
    lines.append("memory in GiB, of both; MFU: useful operations of the data sheet's bf16 peak")
    lines.append("fp16 short: float16 with short float16 sums, and how many times as fast as bf16")
    missing = found["steps"][0]["missing"]
    if missing:
        lines.append(f"not predicted, the registry lacks it: {', '.join(missing)}")
    return "\n".join(lines)
