"""From rows to what a reader compares: providers side by side, prediction beside measurement."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import Row

CPU_PREFIX = "CPU: "
# Provider → mode → row, of one shape of the step benchmark.
Steps = Mapping[str, Mapping[str, Row]]
MEASURED_POLICIES = ("none", "mlp", "block")


def is_cpu(card: str) -> bool:
    """Whether rows of this "card" were taken on a processor."""
    return card.startswith(CPU_PREFIX)


def cards(rows: Iterable[Row]) -> list[str]:
    """The cards in the rows, in order of appearance."""
    return list(dict.fromkeys(row.card for row in rows))


def label_of(shape: str) -> str:
    """The label of a real shape in "label: B=1 L=4096"."""
    return shape.partition(": ")[0] if ": " in shape else ""


def ceilings_of(rows: Iterable[Row]) -> tuple[float, float] | None:
    """Median bandwidth and peak (bytes and operations a second) of the ceiling rows."""
    copies = [row.gb_s * 1e9 for row in rows if row.op == "copy" and row.gb_s]
    products = [row.tflop_s * 1e12 for row in rows if row.op == "product" and row.tflop_s]
    if not copies or not products:
        return None
    return statistics.median(copies), statistics.median(products)


@dataclass(frozen=True)
class Comparison:
    """One op, shape and mode: row by provider."""

    op: str
    shape: str
    mode: str
    tokens: int
    by_provider: Mapping[str, Row]

    def speedup(self, over: str, provider: str = "ours") -> float | None:
        """How many times as fast as another provider; None when one of them has no time."""
        own, other = self.by_provider.get(provider), self.by_provider.get(over)
        if own is None or other is None or not own.p50 or not other.p50:
            return None
        return other.p50 / own.p50


def op_comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Timed ops in the order of the rows; a later row of the same measurement wins."""
    groups: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.op not in ("copy", "product", "block", "step"):
            groups[row.op, row.shape, row.mode, row.tokens or 0][row.provider] = row
    return [Comparison(*key, by_provider) for key, by_provider in groups.items()]


def step_values(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Shape → provider → mode → row of the step benchmark."""
    found: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.op == "step":
            found[row.shape][row.provider][row.mode] = row
    return found


def rank_of(shape: str) -> int | None:
    """R of "B=1 L=4096 S=96 R=32"."""
    words = dict(word.split("=") for word in shape.split() if word.count("=") == 1)
    return int(words["R"]) if words.get("R", "").isdigit() else None


def predicted_ops(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ours measured beside `bench model` at the ceilings of the same run; empty without them.

    Milliseconds. What the model has at other sizes than the benchmark (adapter states) is left out.
    """
    from anima_fast.measure.rates import Rates
    from anima_fast.measure.step_time import PARAMETER_OPS, op_times

    limits, found = ceilings_of(rows), []
    if limits is None:
        return []
    for item in op_comparisons(rows):
        own = item.by_provider.get("ours")
        if own is None or not own.p50 or item.op in PARAMETER_OPS:
            continue
        times = {(t.op, t.label): t for t in op_times(Rates(*limits), tokens=item.tokens)}
        time = times.get((item.op, label_of(item.shape)))
        if time is not None:
            seconds = time.forward_s + (item.mode != "forward") * time.backward_s
            found.append(
                {"op": item.op, "shape": item.shape, "mode": item.mode,
                 "predicted": 1e3 * seconds, "measured": own.p50}
            )  # fmt: skip
    return found


def predicted_steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Step seconds and GiB, predicted and measured, for each policy; empty without ceilings.

    `missing` names what the prediction leaves out. The memory of the CUDA context is not in what
    PyTorch's allocator reports, so it is not in the prediction here.
    """
    from anima_fast.measure.rates import Rates
    from anima_fast.measure.step_time import op_times, step_time
    from anima_fast.memory.lora import published_step
    from anima_fast.memory.plan import GIB

    limits, found = ceilings_of(rows), []
    if limits is None:
        return []
    for shape, by_provider in step_values(rows).items():
        for policy in MEASURED_POLICIES:
            modes = by_provider.get(f"ours {policy}", {})
            step, peak = modes.get("step"), modes.get("peak")
            if step is None or not step.p50:
                continue
            run = {"tokens": step.tokens, "batch": step.batch, "rank": rank_of(shape) or 32}
            time = step_time(op_times(Rates(*limits), **run), policy)
            need = published_step(policy, **run)
            found.append(
                {"shape": shape, "recompute": policy, "predicted_s": time.seconds,
                 "measured_s": step.p50, "predicted_gib": need.device / GIB,
                 "measured_gib": peak.p50 if peak else None, "missing": list(time.missing)}
            )  # fmt: skip
    return found


def parity_summary(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per op: checks, failed ones, and by dtype the largest error in shares of what is allowed."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        entry = found.setdefault(record["op"], {"checks": 0, "failed": [], "worst": {}})
        entry["checks"] += 1
        if not record["passed"]:
            entry["failed"].append(record)
        share = record["error"] / record["allowed"] if record["allowed"] else float("inf")
        dtype = record["dtype"]
        entry["worst"][dtype] = max(share, entry["worst"].get(dtype, 0.0))
    return found
