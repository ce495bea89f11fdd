"""What an approximation lost: one line a kind of layer, the worst module and the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """One module: Frobenius norms of what was to be kept and of what was lost, and ranks."""

    name: str
    norm: float
    lost: float
    rank: int
    old_rank: int | None = None

    @property
    def error(self) -> float:
        """The share that was lost, of the norm."""
        return self.lost / self.norm if self.norm else 0.0


def total_error(losses: Iterable[Loss]) -> float:
    """The lost share of all modules together."""
    losses = list(losses)
    norm = math.hypot(*(loss.norm for loss in losses))
    return math.hypot(*(loss.lost for loss in losses)) / norm if norm else 0.0


def lines(losses: Sequence[Loss], *, verbose: bool = False) -> list[str]:
    """A table of errors by kind of layer (by module with `verbose`), the worst and the total."""
    groups: dict[str, list[Loss]] = {}
    for loss in losses:
        kind = loss.name if verbose else re.sub(r"(blocks|layers)\.\d+\.", r"\1.*.", loss.name)
        groups.setdefault(kind, []).append(loss)
    width = max(map(len, groups))
    head = f"{'layer':<{width}}  modules  {'rank':>9}  error"
    rows = [
        f"{kind:<{width}}  {len(own):>7}  {_ranks(own):>9}  {percent(total_error(own))}"
        for kind, own in groups.items()
    ]
    worst = max(losses, key=lambda loss: loss.error)
    return [
        head,
        *rows,
        f"largest error: {percent(worst.error)} in {worst.name}",
        f"error of the whole: {percent(total_error(losses))} of the norm",
    ]


def _ranks(losses: Sequence[Loss]) -> str:
    ranks = {loss.rank for loss in losses}
    return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def percent(share: float) -> str:
    """A share as text: 12.3 %, 0.0042 %."""
    return f"{100 * share:.3g} %"
