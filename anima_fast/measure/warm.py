"""A card at the clock that lasts: what it reaches in its first calls it does not hold.

A cold card boosts for moments, then power and heat take some of the clock back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

# Batches that are averaged, twice: their means differ by less than the share at the plateau.
# Clocks move in steps of about 1 %, so a few readings would not tell a slow drift.
WINDOW, SHARE = 10, 0.005
BATCH_S, LIMIT_S = 0.2, 20.0


@dataclass(frozen=True)
class Warmth:
    """How long a warm-up took, and whether the plateau came before the limit."""

    seconds: float
    steady: bool


def warm_up(
    batch: Callable[[], float],
    *,
    limit_s: float = LIMIT_S,
    now: Callable[[], float] = time.perf_counter,
) -> Warmth:
    """Run batches of work until what they return is at its plateau, or for `limit_s`.

    Args:
        batch: some `BATCH_S` of work; returns the clock at which it ran, or its rate.
        limit_s: seconds after which no further batch starts.
        now: the time in seconds.
    """
    values: list[float] = []
    start = now()
    while now() - start < limit_s:
        values.append(batch())
        if is_steady(values):
            return Warmth(now() - start, True)
    return Warmth(now() - start, False)


def is_steady(values: Sequence[float]) -> bool:
    """Whether the last `WINDOW` values are in the mean what the `WINDOW` before were."""
    if len(values) < 2 * WINDOW:
        return False
    before, last = mean(values[-2 * WINDOW : -WINDOW]), mean(values[-WINDOW:])
    return abs(last - before) <= SHARE * before
