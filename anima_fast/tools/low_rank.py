"""The best approximation of a matrix by one of low rank, for matrices and for products of factors.

A matrix A [m, n], m ≤ n, is decomposed through its Gram matrix: A Aᵀ = U diag(s²) Uᵀ, in float64.
The best approximation of rank R (in the Frobenius norm) is U_R (U_Rᵀ A). Squaring costs half the
digits of small singular values, which leaves 8 of float64's 16: as many as float32 has.
At 2048 x 8192 on one core of a server that takes 2 to 3 s, torch.linalg.svd 11 s in float32 (2026).

A product L·R of thin factors is never built: L = Q₁T₁ and Rᵀ = Q₂T₂ leave the small core T₁T₂ᵀ.
The Hadamard product of a LoHa and the Kronecker product of a LoKr are such products too (`factors`
in adapters/deltas.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anima_fast.adapters.deltas import Delta


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix and the vectors of one side.

    Attributes:
        values: singular values [k], falling, float64.
        vectors: those of the outputs [m, k]; of the inputs [n, k] when `transposed`.
        matrix: the matrix, or its transpose when `transposed`.
    """

    values: Tensor
    vectors: Tensor
    matrix: Dense | Product
    transposed: bool = False

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best approximation of a rank: up [m, R] and down [R, n], float64, of equal norms."""
        vectors = self.vectors[:, :rank]
        rows = self.matrix.project(vectors)
        root = rows.norm(dim=1).sqrt()
        # A component of norm 0 stays 0.
        rows, columns = rows / torch.where(root > 0, root, 1.0)[:, None], vectors * root
        return (rows.T, columns.T) if self.transposed else (columns, rows)


@dataclass(frozen=True)
class Dense:
    """A matrix [m, n] as it is, float64."""

    matrix: Tensor

    def norm(self) -> float:
        """Frobenius norm."""
        return self.matrix.norm().item()

    def distance(self, up: Tensor, down: Tensor) -> float:
        """Frobenius norm of the difference to up · down."""
        return (self.matrix - up.to(self.matrix) @ down.to(self.matrix)).norm().item()

    def project(self, vectors: Tensor) -> Tensor:
        """vectorsᵀ · matrix, [k, n]."""
        return vectors.T @ self.matrix

    def spectrum(self) -> Spectrum:
        """All min(m, n) singular values."""
        m, n = self.matrix.shape
        matrix = self.matrix if m <= n else self.matrix.T
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
        values = squares.flip(0).clamp_min(0).sqrt()
        return Spectrum(values, vectors.flip(1), Dense(matrix), transposed=m > n)


@dataclass(frozen=True)
class Product:
    """left [m, k] times right [k, n], k at most min(m, n), float64."""

    left: Tensor
    right: Tensor

    def norm(self) -> float:
        """Frobenius norm: ‖LR‖² = Σ (LᵀL) ∘ (RRᵀ)."""
        square = ((self.left.T @ self.left) * (self.right @ self.right.T)).sum()
        return square.clamp_min(0).sqrt().item()

    def distance(self, up: Tensor, down: Tensor) -> float:
        """Frobenius norm of the difference to up · down."""
        left = torch.cat([self.left, up.to(self.left)], 1)
        return Product(left, torch.cat([self.right, -down.to(self.right)])).norm()

    def project(self, vectors: Tensor) -> Tensor:
        """vectorsᵀ · left · right, [k, n]."""
        return (vectors.T @ self.left) @ self.right

    def spectrum(self) -> Spectrum:
        """The k singular values."""
        left, left_core = torch.linalg.qr(self.left)
        right_core = torch.linalg.qr(self.right.T, mode="r")[1]
        u, values, _ = torch.linalg.svd(left_core @ right_core.T)
        return Spectrum(values, left @ u, self)


Matrix = Dense | Product


def weighted_sum(
    terms: Sequence[tuple[float, Delta]], device: torch.device | str = "cpu"
) -> Matrix:
    """Σ weight · product, without alpha: fold it into the weights.

    Factors are kept where all of them together have at most half as many columns as the matrix has
    on its shorter side; beyond, they would cost more than the matrix itself.
    """
    shapes = {delta.shape for _, delta in terms}
    if len(shapes) != 1:
        raise ValueError(f"parts for layers of different sizes: {sorted(shapes)}")
    limit = min(shapes.pop()) // 2
    terms = [(weight, delta.map(lambda t: t.to(device).double())) for weight, delta in terms]
    if sum(delta.columns for _, delta in terms) <= limit:
        pairs = [(weight, *delta.factors()) for weight, delta in terms]
        left = torch.cat([weight * left for weight, left, _ in pairs], 1)
        return Product(left, torch.cat([right for _, _, right in pairs]))
    first, *rest = (weight * delta.product() for weight, delta in terms)
    return Dense(sum(rest, first))
