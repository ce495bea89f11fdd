"""The adapter of one linear layer in training: y = W x + multiplier · Δ(x), with W frozen.

`AdaptedLinear` is what LoRA, LoHa and LoKr (lycoris.py) share: it replaces the layer's `forward`,
is made from a Δ as files hold it (deltas.py) and gives one back. Adapters on one layer add up.

With a magnitude m (DoRA) the layer computes with W' = m · (W + Δ) / ‖W + Δ‖, where W has the
adapters below built in. Magnitudes of the outputs, m [out, 1], become a factor on the output,
those of the inputs, m [1, in], one on the input; the norms are taken over a few rows of W + Δ at a
time, which backward recomputes. W' itself is never built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anima_fast.adapters.deltas import NORM_FLOOR, Delta, LoRADelta, is_of_inputs
from anima_fast.adapters.targets import Target
from anima_fast.kernels.op import wide
from anima_fast.models.adapter_kinds import LORA, AdapterKind
from anima_fast.models.dit_layers import attached, weight_scale

# Rows of a weight whose norm or product is computed at once.
ROWS = 1024
AnyDelta = TypeVar("AnyDelta", bound=Delta)


@dataclass(frozen=True)
class Dropouts:
    """Probabilities, in train mode only; None is 0. Survivors are scaled up.

    Attributes:
        dropout: of zeroing an element of down(x) (LoRA only).
        rank: of zeroing a rank component for a sample (LoRA) or an output for a call (LoHa, LoKr).
        module: of skipping the adapter for a call.
    """

    dropout: float | None = None
    rank: float | None = None
    module: float | None = None


class AdaptedLinear(nn.Module, Generic[AnyDelta]):
    """The adapter of one linear layer, with initial matrices, alpha and magnitudes."""

    kind: ClassVar[AdapterKind]
    # Names of the matrices whose learning rate LoRA+ multiplies.
    plus: ClassVar[tuple[str, ...]]
    # ((out, in), rank, generator, **settings of the kind) -> initial values with Δ = 0.
    initial: ClassVar[Callable[..., Delta]]

    def __init__(self, target: Target, delta: AnyDelta, dropouts: Dropouts) -> None:
        super().__init__()
        self.name, self.rank, self.dropouts = target.name, delta.rank, dropouts
        self.scale = delta.scale
        self.alpha = float(delta.rank or 1) if delta.alpha is None else delta.alpha.item()
        self.multiplier = 1.0
        # float32 until the network's buffer takes over the values.
        self._trained = delta.map(lambda t: nn.Parameter(t.detach().float().contiguous()))
        for name, parameter in self._trained.fields().items():
            self.register_parameter(name, parameter)
        # In a list, so that the layer does not become a submodule of its own adapter.
        self._linear = [target.linear]
        self._below: list[AdaptedLinear] = []
        self._plain_forward: Callable[[Tensor], Tensor] = target.linear.forward
        self._removed = False

    @property
    def title(self) -> str:
        """LoRA, LoHa, LoKr or DoRA."""
        return self._trained.title

    def attach(self) -> None:
        """Let the layer compute with this adapter, on top of those that it already has."""
        linear = self._linear[0]
        self._below = list(attached(linear))[-1:]
        self._plain_forward, linear.forward = linear.forward, self.forward
        # Read by the fused block, which computes layer and adapter together.
        linear.adapters = [*attached(linear), self]

    def remove(self) -> None:
        """Let the layer compute without this adapter; others on the layer stay."""
        linear = self._linear[0]
        # If other adapters were attached on top, this one stays in the chain as a pass-through.
        self._removed = True
        linear.adapters = [a for a in attached(linear) if a is not self]
        if linear.__dict__.get("forward") == self.forward:
            del linear.forward
            if linear.forward != self._plain_forward:
                linear.forward = self._plain_forward

    def as_delta(self, convert: Callable[[Tensor], Tensor] = lambda t: t) -> AnyDelta:
        """The adapter as a file holds it, its matrices passed through `convert`."""
        copied = self._trained.map(lambda t: convert(t.detach()))
        return replace(copied, alpha=torch.tensor(self.alpha))

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        """Take the values of a Δ of the same kind and sizes, whatever its alpha."""
        for name, tensor in delta.fields().items():
            getattr(self, name).copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out] in x's dtype."""
        if self._removed or self._left_out():
            return self._plain_forward(x)
        if self._trained.dora_scale is None:
            return self._plain_forward(x) + self.delta(x, self.multiplier)
        return self._decomposed(x)

    def delta(self, x: Tensor, strength: float) -> Tensor:
        """strength · Δ(x) with alpha / R and dropout: [..., in] → [..., out] in x's dtype."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of Δ [stop − start, in] in float32, with alpha / R, without dropout."""
        raise NotImplementedError

    @property
    def drops(self) -> bool:
        """Whether the result of a call is random."""
        d = self.dropouts
        return self.training and bool(d.dropout or d.rank or d.module)

    def _left_out(self) -> bool:
        """Module dropout, drawn on the CPU generator, which never waits for the device."""
        probability = self.dropouts.module if self.training else None
        return bool(probability) and torch.rand(()).item() < probability

    def _decomposed(self, x: Tensor) -> Tensor:
        plain, bias = self._plain_forward(x), self._linear[0].bias
        factor = self._factor(self._linear[0].weight)
        # W' − W takes the factor minus one, which keeps its digits in 16 bits: a factor near one
        # would lose all changes below half a percent.
        factor, change = factor.to(x.dtype), (factor - 1).to(x.dtype)
        if is_of_inputs(self.dora_scale):
            product = self._plain_forward(x * change)
            product = product if bias is None else product - bias
            return plain + self.multiplier * (product + self.delta(x * factor, 1.0))
        product = plain if bias is None else plain - bias
        return plain + self.multiplier * (change * product + factor * self.delta(x, 1.0))

    def _factor(self, weight: Tensor) -> Tensor:
        """m / ‖W + Δ‖, one number each output or input, float32."""
        of_inputs = is_of_inputs(self.dora_scale)
        # W is passed in and not looked up: a swapped block has it on the device in forward only.
        squares = [
            checkpoint(self._squares, weight, start, stop, of_inputs, use_reentrant=False)
            for start, stop in row_ranges(self._linear[0].out_features)
        ]
        square = sum(squares) if of_inputs else torch.cat(squares)
        return wide(self.dora_scale).view(-1) / square.sqrt().clamp_min(NORM_FLOOR)

    def _squares(self, weight: Tensor, start: int, stop: int, of_inputs: bool) -> Tensor:
        decomposed = self._base_rows(weight, start, stop) + self.rows(start, stop)
        return decomposed.square().sum(dim=0 if of_inputs else 1)

    def _base_rows(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the weight with the adapters below built in, float32."""
        for below in self._below:
            return below._built_rows(weight, start, stop)
        return wide(weight[start:stop]) * weight_scale(self._linear[0])

    def _built_rows(self, weight: Tensor, start: int, stop: int) -> Tensor:
        base = self._base_rows(weight, start, stop)
        if self._removed:
            return base
        if self._trained.dora_scale is None:
            return base + self.multiplier * self.rows(start, stop)
        factor = self._factor(weight)
        factor = factor if is_of_inputs(self.dora_scale) else factor[start:stop, None]
        return base + self.multiplier * (factor * (base + self.rows(start, stop)) - base)


def initial_lora(shape: tuple[int, int], rank: int, generator: torch.Generator) -> LoRADelta:
    """Initial values as in sd-scripts: down uniform in ±1/√in, up zero."""
    out_features, in_features = shape
    bound = 1 / math.sqrt(in_features)
    down = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return LoRADelta(down, torch.zeros(out_features, rank))


class LoRALinear(AdaptedLinear[LoRADelta]):
    """LoRA: Δ(x) = (alpha / R) · up(down(x))."""

    kind = LORA
    plus = ("up",)
    initial = staticmethod(initial_lora)
    rank: int
    down: Tensor
    up: Tensor
    # Which rank components a batch may use, [B, R] (T-LoRA, network.py); None means all.
    rank_mask: Tensor | None = None

    @property
    def drops(self) -> bool:
        return super().drops or (self.training and self.rank_mask is not None)

    def draw(self, batch: int, length: int, like: Tensor) -> tuple[float, Tensor | None]:
        """The scale of one call (0: left out) and the factors [B, L, R] of down(x), None for ones.

        They are drawn as `forward` does, in the dtype of `like`.
        """
        if self._removed or self._left_out():
            return 0.0, None
        scale, factor = self.multiplier * self.scale, None
        if self.training and self.dropouts.dropout:
            factor = F.dropout(like.new_ones(batch, length, self.rank), self.dropouts.dropout)
        for mask in self._masks((batch, 1, self.rank), like):
            factor = mask.expand(batch, length, -1) if factor is None else factor * mask
        if self.training and self.dropouts.rank:
            scale = scale / (1 - self.dropouts.rank)
        return scale, factor

    def delta(self, x: Tensor, strength: float) -> Tensor:
        h = F.linear(x, self.down.to(x.dtype))  # [..., R]
        scale = strength * self.scale
        if self.training and self.dropouts.dropout:
            h = F.dropout(h, self.dropouts.dropout)
        # One mask per sample, however many token dimensions there are.
        for mask in self._masks((h.shape[0], *[1] * (h.ndim - 2), self.rank), h):
            h = h * mask
        if self.training and self.dropouts.rank:
            scale = scale / (1 - self.dropouts.rank)
        return scale * F.linear(h, self.up.to(x.dtype))

    def rows(self, start: int, stop: int) -> Tensor:
        return self.scale * (wide(self.up[start:stop]) @ wide(self.down))

    def _masks(self, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Factors of down(x) that all tokens of a sample share."""
        if not self.training:
            return []
        masks = []
        if self.dropouts.rank:
            masks.append(torch.bernoulli(like.new_full(shape, 1 - self.dropouts.rank)))
        if self.rank_mask is not None:
            masks.append(self.rank_mask.to(like).view(shape))
        return masks


def row_ranges(rows: int) -> list[tuple[int, int]]:
    """[0, rows) in ranges of at most `ROWS`."""
    return [(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]
