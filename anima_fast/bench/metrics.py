"""The metrics of run files: unit, direction, and from what change on a comparison fails."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How two values of a metric are compared.

    Attributes:
        unit: of a value.
        better: "less", "more", or "" where any change is one for the worse.
        limit: the relative change for the worse that is still accepted; None: never fails.
        exact: repeated runs give the same digits, so that any change is one of the code.
        parts: "judged" one by one as the value is; "counted", where a part that is absent is 0;
            or only "shown", where the value is their sum, or they tell about it.
    """

    unit: str
    better: str = "less"
    limit: float | None = 0.0
    exact: bool = True
    parts: str = "judged"
    told: float = 0.0


METRICS = {
    "error": Metric("relative", limit=0.05),
    "time": Metric("s", limit=None, exact=False),
    "kept": Metric("bytes", parts="shown"),
    "peak": Metric("bytes", parts="shown"),
    # Of a process, as the operating system counts it: pages of every library, not tensors.
    "resident": Metric("bytes", limit=None, exact=False),
    "launches": Metric("launches", parts="shown"),
    "units": Metric("[L, D]", parts="shown"),
    "registers": Metric("registers"),
    "spills": Metric("bytes"),
    "shared": Metric("bytes", limit=None),
    "occupancy": Metric("share", better="more", limit=0.0),
    "instructions": Metric("instructions", better="", limit=None, parts="shown"),
    # Losses repeat to the last digit on one machine; other roundings move them by some 1e-6.
    "loss": Metric("loss", better="", limit=1e-4),
    "modules": Metric("packages", parts="counted"),
    "startup": Metric("s", limit=None, exact=False, told=0.2),
    # Of all kernels of an op, Triton's cache empty.
    "compile": Metric("s", limit=None, exact=False, told=0.2),
    # What a card can do, measured in the same run: never a verdict.
    "ceiling": Metric("1/s", better="more", limit=None, exact=False, parts="shown"),
}
