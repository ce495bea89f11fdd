"""LoHa and LoKr while they train: products that are applied without being built in full.

LoHa: Δ = (alpha / R) · (w1_a w1_b) ∘ (w2_a w2_b). A Hadamard product cannot be applied through its
factors at rank R (that would take R² columns), so Δ is built, used and dropped a band of rows at a
time, in backward too. LoKr: Δ = (alpha / R) · w1 ⊗ w2, so with x read as a matrix X [in₁, in₂]

    y = w1 · X · w2ᵀ                [out₁, out₂]

in whichever order takes fewer operations; w2 = w2_a w2_b stays two thin products.

Names, the split of dimensions, initial values and defaults are those of LyCORIS 4.1
(KohakuBlueleaf/LyCORIS, Apache-2.0), which sd-scripts' networks.loha and networks.lokr share.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anima_fast.adapters.deltas import LoHaDelta, LoKrDelta, multiplied
from anima_fast.adapters.layers import AdaptedLinear, AnyDelta, row_ranges
from anima_fast.kernels.op import wide
from anima_fast.models.adapter_kinds import LOHA, LOKR
from anima_fast.models.dit_layers import weight_scale


def split(dimension: int, factor: int = -1) -> tuple[int, int]:
    """The two sizes of a dimension in a Kronecker product, the smaller first.

    `factor` and its counterpart when it divides the dimension; else the pair of divisors nearest to
    a square whose smaller one is at most `factor` (−1: any).
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = dimension if factor <= 0 else factor
    small = max(d for d in range(1, math.isqrt(dimension) + 1) if dimension % d == 0 and d <= limit)
    return small, dimension // small


def initial_loha(shape: tuple[int, int], rank: int, generator: torch.Generator) -> LoHaDelta:
    """Initial values: w1_a N(0, 0.1), w1_b and w2_b N(0, 1), w2_a zero."""
    out_features, in_features = shape

    def normal(std: float, *size: int) -> Tensor:
        return torch.empty(size).normal_(0, std, generator=generator)

    return LoHaDelta(
        w1_a=normal(0.1, out_features, rank),
        w1_b=normal(1.0, rank, in_features),
        w2_a=torch.zeros(out_features, rank),
        w2_b=normal(1.0, rank, in_features),
    )


def initial_lokr(
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator,
    *,
    factor: int = -1,
    decompose_both: bool = False,
    full_matrix: bool = False,
) -> LoKrDelta:
    """Initial values: w1 and w2_a Kaiming uniform (a = √5), w2 or w2_b zero.

    Args:
        rank: R; a factor that would not be smaller as two thin ones (R ≥ half its longer side) is
            full.
        factor: of `split`.
        decompose_both: w1 as two thin factors too.
        full_matrix: both factors full, whatever the rank.
    """
    (out_1, out_2), (in_1, in_2) = (split(dimension, factor) for dimension in shape)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    found: dict[str, Tensor] = {}
    if decompose_both and not full_matrix and rank < max(out_1, in_1) / 2:
        found |= {"w1_a": kaiming(out_1, rank), "w1_b": kaiming(rank, in_1)}
    else:
        found["w1"] = kaiming(out_1, in_1)
    if not full_matrix and rank < max(out_2, in_2) / 2:
        found |= {"w2_a": kaiming(out_2, rank), "w2_b": torch.zeros(rank, in_2)}
    else:
        found["w2"] = torch.zeros(out_2, in_2)
    return LoKrDelta(**found)


class LycorisLinear(AdaptedLinear[AnyDelta]):
    """What LoHa and LoKr share: rank dropout drops outputs, the same ones throughout a call."""

    def _kept_outputs(self, y: Tensor) -> Tensor:
        if not (self.training and self.dropouts.rank):
            return y
        keep = 1 - self.dropouts.rank
        return y * (torch.bernoulli(y.new_full(y.shape[-1:], keep)) / keep)


class LoHaLinear(LycorisLinear[LoHaDelta]):
    """Δ = (alpha / R) · (w1_a w1_b) ∘ (w2_a w2_b)."""

    kind = LOHA
    plus = ("w2_a",)
    initial = staticmethod(initial_loha)
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def delta(self, x: Tensor, strength: float) -> Tensor:
        factors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return self._kept_outputs(HadamardProduct.apply(x, *factors, strength * self.scale))

    def rows(self, start: int, stop: int) -> Tensor:
        first = wide(self.w1_a[start:stop]) @ wide(self.w1_b)
        return self.scale * first * (wide(self.w2_a[start:stop]) @ wide(self.w2_b))


class HadamardProduct(torch.autograd.Function):
    """y = scale · x ((w1_a w1_b) ∘ (w2_a w2_b))ᵀ, a band of rows of the product at a time.

    With G = scale · dyᵀ x, and W1, W2 the two products:
    dw1_a = (G ∘ W2) w1_bᵀ, dw1_b = w1_aᵀ (G ∘ W2), the same with 1 and 2 exchanged, and
    dx = scale · dy (W1 ∘ W2). Products of factors are made in float32; x, y and dy have one dtype.
    """

    @staticmethod
    def forward(ctx, x, w1_a, w1_b, w2_a, w2_b, scale):
        ctx.save_for_backward(x, w1_a, w1_b, w2_a, w2_b)
        ctx.scale = scale
        y = x.new_empty(*x.shape[:-1], w1_a.shape[0])
        for start, stop in row_ranges(w1_a.shape[0]):
            first = wide(w1_a[start:stop]) @ wide(w1_b)
            band = first.mul_(wide(w2_a[start:stop]) @ wide(w2_b)).mul_(scale)
            y[..., start:stop] = F.linear(x, band.to(x.dtype))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w1_a, w1_b, w2_a, w2_b = ctx.saved_tensors
        flat_x = x.reshape(-1, x.shape[-1])
        flat_dy = dy.reshape(-1, dy.shape[-1])
        dx = torch.zeros_like(flat_x, dtype=wide(w1_a).dtype) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(w, dtype=wide(w).dtype) for w in (w1_a, w1_b, w2_a, w2_b)]
        b1, b2 = wide(w1_b), wide(w2_b)
        for start, stop in row_ranges(w1_a.shape[0]):
            a1, a2 = wide(w1_a[start:stop]), wide(w2_a[start:stop])
            first, second = a1 @ b1, a2 @ b2
            rows = flat_dy[:, start:stop]
            if dx is not None:
                dx += rows @ (first * second).to(rows.dtype)
            outer = wide(rows.T @ flat_x)
            of_first, of_second = outer * second, outer.mul_(first)
            grads[0][start:stop] = of_first @ b1.T
            grads[1] += a1.T @ of_first
            grads[2][start:stop] = of_second @ b2.T
            grads[3] += a2.T @ of_second
        if dx is not None:
            dx = (ctx.scale * dx).to(x.dtype).view(x.shape)
        given = (w1_a, w1_b, w2_a, w2_b)
        grads = [(ctx.scale * g).to(w.dtype) for g, w in zip(grads, given, strict=True)]
        return dx, *grads, None


class LoKrLinear(LycorisLinear[LoKrDelta]):
    """Δ = (alpha / R) · w1 ⊗ w2, each factor full or a product of two."""

    kind = LOKR
    plus = ("w1",)
    initial = staticmethod(initial_lokr)

    def delta(self, x: Tensor, strength: float) -> Tensor:
        # The small factor takes the scale.
        first = strength * self.scale * multiplied(self._trained.first)
        first = first.to(x.dtype)  # [out₁, in₁]
        # w2_b comes before w2_a on the way from x to y.
        seconds = [w.to(x.dtype) for w in reversed(self._trained.second)]
        outer, inner = first.shape[1], seconds[0].shape[1]
        grid = x.reshape(-1, outer, inner)  # [N, in₁, in₂]
        if _first_is_cheaper(first.shape, [w.shape for w in seconds]):
            y = _on_last(_on_middle(grid, first), seconds)
        else:
            y = _on_middle(_on_last(grid, seconds), first)
        return self._kept_outputs(y.reshape(*x.shape[:-1], -1))

    def rows(self, start: int, stop: int) -> Tensor:
        first = multiplied(self._trained.first)
        second = multiplied(self._trained.second)
        index = torch.arange(start, stop, device=first.device)
        outer, inner = index // second.shape[0], index % second.shape[0]
        # Row (l, k) of a Kronecker product is the outer product of row l and row k.
        rows = first[outer][:, :, None] * second[inner][:, None, :]
        return self.scale * rows.flatten(1)


def _on_last(grid: Tensor, matrices: list[Tensor]) -> Tensor:
    """grid wᵀ for each w in turn: [N, m, n] → [N, m, k]."""
    for matrix in matrices:
        grid = F.linear(grid, matrix)
    return grid


def _on_middle(grid: Tensor, first: Tensor) -> Tensor:
    """w grid: [N, m, n] → [N, l, n]; one product, not N small ones."""
    return F.linear(grid.transpose(1, 2), first).transpose(1, 2)


def _first_is_cheaper(first: torch.Size, seconds: list[torch.Size]) -> bool:
    """Whether w1 should be applied before w2, by multiplications per input."""
    (out_1, in_1), in_2, out_2 = first, seconds[0][1], seconds[-1][0]
    of_second = sum(rows * columns for rows, columns in seconds)
    before = out_1 * in_1 * in_2 + out_1 * of_second
    after = in_1 * of_second + out_1 * in_1 * out_2
    return before < after


def initial_magnitudes(linear: nn.Linear, of_inputs: bool = False) -> Tensor:
    """‖W‖ over the inputs of each output [out, 1], or over the outputs of each input [1, in]."""
    weight = linear.weight.detach()
    norms = torch.linalg.vector_norm(
        weight, dim=0 if of_inputs else 1, keepdim=True, dtype=torch.float32
    )
    norms = norms * weight_scale(linear)
    return norms if norms.is_meta else norms.cpu()
