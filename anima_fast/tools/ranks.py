"""How many singular values each module keeps, and what that loses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anima_fast.adapters.deltas import LoRADelta
from anima_fast.errors import UserError
from anima_fast.tools.low_rank import Matrix

# The names of sd-scripts' resize_lora and what each keeps at a parameter p.
METHODS = {
    "sv_ratio": "values above the largest one divided by p",
    "sv_fro": "the first values whose Frobenius norm is the share p of the whole",
    "sv_cumulative": "the first values whose sum is the share p of the whole",
}


@dataclass(frozen=True)
class RankRule:
    """At most `rank`, or what a method keeps of the singular values; with both, the lesser."""

    rank: int | None = None
    method: str | None = None
    parameter: float = 1.0

    @classmethod
    def of(
        cls, rank: int | None = None, dynamic: str | None = None, energy: float | None = None
    ) -> RankRule:
        """The rule of the options --rank, --dynamic METHOD:NUMBER and --energy."""
        if rank is not None and rank < 1:
            raise UserError(f"--rank {rank}: the rank must be at least 1")
        if dynamic is not None and energy is not None:
            raise UserError("--dynamic and --energy both choose the rank: give one of them")
        if energy is not None:
            if not 0 < energy <= 1:
                raise UserError(f"--energy {energy:g}: use a share between 0 and 1, such as 0.95")
            # Energy is the square of the Frobenius norm.
            return cls(rank, "sv_fro", math.sqrt(energy))
        if dynamic is not None:
            return cls(rank, *_parse(dynamic))
        if rank is None:
            raise UserError("give --rank, --energy or --dynamic: one of them chooses the rank")
        return cls(rank)

    def choose(self, values: Tensor) -> int:
        """The rank for singular values [k], falling: between 1 and k."""
        kept = len(values) if self.method is None else self._dynamic(values)
        return max(1, min(kept, len(values), self.rank or len(values)))

    def _dynamic(self, values: Tensor) -> int:
        if self.method == "sv_ratio":
            return int((values > values[0] / self.parameter).sum())
        shares = values.square() if self.method == "sv_fro" else values
        target = self.parameter**2 if self.method == "sv_fro" else self.parameter
        sums = torch.cumsum(shares, 0)
        # Rounding of the sum must not cost a component when everything is to be kept.
        return int((sums < target * sums[-1] * (1 - 1e-12)).sum()) + 1

    def __str__(self) -> str:
        parts = [f"rank {self.rank}"] if self.rank else []
        if self.method:
            parts.append(f"{self.method}:{self.parameter:g}")
        return ", ".join(parts)


def _parse(text: str) -> tuple[str, float]:
    method, _, number = text.partition(":")
    low, high = (1.0, math.inf) if method == "sv_ratio" else (0.0, 1.0)
    try:
        parameter = float(number)
    except ValueError:
        parameter = math.nan
    if method not in METHODS:
        raise UserError(f"--dynamic {text}: use one of {', '.join(METHODS)}, such as sv_fro:0.9")
    if not low < parameter <= high or math.isinf(parameter):
        wanted = "a number above 1" if method == "sv_ratio" else "a share between 0 and 1"
        example = "sv_ratio:20" if method == "sv_ratio" else f"{method}:0.9"
        raise UserError(f"--dynamic {text}: {method} takes {wanted}, such as {example}")
    return method, parameter


@dataclass(frozen=True)
class ModuleLoss:
    """One module: Frobenius norms of what was to be kept and of what was lost, and its ranks."""

    name: str
    norm: float
    lost: float
    rank: int
    old_rank: int | None = None

    @property
    def error(self) -> float:
        """The share of the norm that was lost."""
        return self.lost / self.norm if self.norm else 0.0


def rounded(
    name: str,
    matrix: Matrix,
    delta: LoRADelta,
    dtype: torch.dtype | None,
    old_rank: int | None = None,
) -> tuple[LoRADelta, ModuleLoss]:
    """A module's LoRA in the dtype of its file, and what it then has lost of a matrix."""
    up, down = (t.to("cpu", dtype).contiguous() for t in (delta.up, delta.down))
    delta = replace(delta, up=up, down=down)
    lost = matrix.distance(delta.scale * up.double(), down)
    return delta, ModuleLoss(name, matrix.norm(), lost, delta.rank, old_rank)


def full_alpha(rank: int) -> Tensor:
    """The alpha of scale 1."""
    return torch.tensor(float(rank))


def total_error(losses: Iterable[ModuleLoss]) -> float:
    """The lost share of all modules together."""
    losses = list(losses)
    norm = math.hypot(*(loss.norm for loss in losses))
    return math.hypot(*(loss.lost for loss in losses)) / norm if norm else 0.0


def loss_table(losses: Sequence[ModuleLoss], *, verbose: bool = False) -> list[str]:
    """Lines of errors by kind of layer (by module with `verbose`), the largest and the total."""
    groups: dict[str, list[ModuleLoss]] = {}
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


def _ranks(losses: Sequence[ModuleLoss]) -> str:
    ranks = {loss.rank for loss in losses}
    return f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def percent(share: float) -> str:
    """A share as text: 12.3 %, 0.0042 %."""
    return f"{100 * share:.3g} %"
