"""The change Δ of one weight, as a file holds it: LoRA, LoHa or LoKr, with or without DoRA.

    LoRA    Δ = (alpha / R) · up down
    LoHa    Δ = (alpha / R) · (w1_a w1_b) ∘ (w2_a w2_b)
    LoKr    Δ = (alpha / R) · w1 ⊗ w2        each factor full or a product of two; scale 1 when
                                             both are full, since then there is no R
    DoRA    W' = m · (W + Δ) / ‖W + Δ‖       norm over the inputs of each output (m [out, 1]), or
                                             over the outputs of each input (m [1, in])

At strength s the weight is W + s·Δ, with DoRA W + s·(W' − W). Suffixes, shapes and the meaning of
alpha are those of LyCORIS 4.1 and of ComfyUI's loader.

Every Δ is also a product of two matrices, which `factors` gives (tools/low_rank.py needs it):

    (a₁b₁) ∘ (a₂b₂) = (a₁ • a₂)(b₁ • b₂)       • pairs every column of a₁ with every one of a₂
    (a₁b₁) ⊗ (a₂b₂) = (a₁ ⊗ a₂)(b₁ ⊗ b₂)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from anima_fast.kernels.op import wide
from anima_fast.models.adapter_kinds import (
    LOHA,
    LOKR,
    LORA,
    MAGNITUDES,
    AdapterKind,
    kind_of,
    title_of,
)

# No float32 norm of a weight row is this small; it keeps a row of zeros finite.
NORM_FLOOR = 1e-12
AnyDelta = TypeVar("AnyDelta", bound="Delta")


@dataclass(frozen=True)
class Delta:
    """What all kinds share; a subclass has the matrices as fields.

    An alpha of None means the rank; `dora_scale` are the magnitudes m, None without DoRA.
    """

    kind: ClassVar[AdapterKind]
    alpha: Tensor | None = field(default=None, kw_only=True)
    dora_scale: Tensor | None = field(default=None, kw_only=True)

    @property
    def rank(self) -> int | None:
        """R; None where both factors of a LoKr are full."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Δ without alpha / R, [out, in], float32 or wider."""
        raise NotImplementedError

    def times(self: AnyDelta, factor: float) -> AnyDelta:
        """Δ multiplied by a number, which one of the matrices takes."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """left [out, k] and right [k, in] whose product is `product()`, in the matrices' dtype."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it is for."""
        left, right = (self.matrices()[suffix] for suffix in self.kind.products[0])
        return left.shape[0], right.shape[1]

    @property
    def columns(self) -> int:
        """k of `factors`, without building them."""
        return self.map(lambda tensor: tensor.to("meta")).factors()[0].shape[1]

    @property
    def title(self) -> str:
        """What users call it: LoRA, LoHa, LoKr or DoRA."""
        return title_of(self.kind, dora=self.dora_scale is not None)

    @property
    def is_plain_lora(self) -> bool:
        """LoRA without magnitudes, which every program reads."""
        return self.kind is LORA and self.dora_scale is None

    @property
    def scale(self) -> float:
        """alpha / R; 1 where either is missing."""
        if self.alpha is None or self.rank is None:
            return 1.0
        return self.alpha.item() / self.rank

    def matrix(self) -> Tensor:
        """Δ [out, in], float32 or wider, on the device of the matrices."""
        return self.product() * self.scale

    def settled(self: AnyDelta) -> AnyDelta:
        """The same Δ at scale 1, alpha = R: programs agree on it whether they read alpha or not."""
        if self.alpha is None or self.rank is None or self.scale == 1:
            return self
        return replace(self.times(self.scale), alpha=torch.full_like(self.alpha, self.rank))

    def matrices(self) -> dict[str, Tensor]:
        """The trained matrices by suffix (`down` and `up` for LoRA)."""
        return {self.kind.prefix + name: tensor for name, tensor in self._own().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a file holds of it, by suffix."""
        more = {"alpha": self.alpha, MAGNITUDES: self.dora_scale}
        return self.matrices() | {name: t for name, t in more.items() if t is not None}

    def fields(self) -> dict[str, Tensor]:
        """Matrices and magnitudes by the name of their field."""
        own = self._own()
        return own if self.dora_scale is None else own | {MAGNITUDES: self.dora_scale}

    def _own(self) -> dict[str, Tensor]:
        """Matrices by the name of their field."""
        shared = ("alpha", MAGNITUDES)
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in shared}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def map(self: AnyDelta, function: Callable[[Tensor], Tensor]) -> AnyDelta:
        """`function` applied to the matrices and magnitudes; alpha stays."""
        changed = {name: function(tensor) for name, tensor in self.fields().items()}
        return replace(self, **changed)


@dataclass(frozen=True)
class LoRADelta(Delta):
    """down [R, in], up [out, R]."""

    kind = LORA
    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        return wide(self.up) @ wide(self.down)

    def times(self, factor: float) -> LoRADelta:
        return replace(self, up=_scaled(self.up, factor))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down


@dataclass(frozen=True)
class LoHaDelta(Delta):
    """w1_a, w2_a [out, R] and w1_b, w2_b [R, in]."""

    kind = LOHA
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def product(self) -> Tensor:
        first = wide(self.w1_a) @ wide(self.w1_b)
        return first * (wide(self.w2_a) @ wide(self.w2_b))

    def times(self, factor: float) -> LoHaDelta:
        return replace(self, w2_a=_scaled(self.w2_a, factor))

    def factors(self) -> tuple[Tensor, Tensor]:
        left = (self.w1_a[:, :, None] * self.w2_a[:, None, :]).flatten(1)
        return left, (self.w1_b[:, None, :] * self.w2_b[None, :, :]).flatten(0, 1)


@dataclass(frozen=True)
class LoKrDelta(Delta):
    """w1 [out₁, in₁] and w2 [out₂, in₂], each full or as w_a [.., R] and w_b [R, ..]."""

    kind = LOKR
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None

    @property
    def rank(self) -> int | None:
        for factor in (self.w2_b, self.w1_b):
            if factor is not None:
                return factor.shape[0]
        return None

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.first, self.second
        return first[0].shape[0] * second[0].shape[0], first[-1].shape[1] * second[-1].shape[1]

    @property
    def first(self) -> tuple[Tensor, ...]:
        """w1 as (full,) or (w1_a, w1_b)."""
        return _factor(self.w1, self.w1_a, self.w1_b)

    @property
    def second(self) -> tuple[Tensor, ...]:
        """w2 as (full,) or (w2_a, w2_b)."""
        return _factor(self.w2, self.w2_a, self.w2_b)

    def product(self) -> Tensor:
        return torch.kron(multiplied(self.first), multiplied(self.second))

    def times(self, factor: float) -> LoKrDelta:
        if self.w2 is not None:
            return replace(self, w2=_scaled(self.w2, factor))
        return replace(self, w2_b=_scaled(self.second[1], factor))

    def factors(self) -> tuple[Tensor, Tensor]:
        (a1, b1), (a2, b2) = _as_pair(self.first), _as_pair(self.second)
        return torch.kron(a1, a2), torch.kron(b1, b2)


DELTAS: dict[AdapterKind, type[Delta]] = {
    cls.kind: cls for cls in (LoRADelta, LoHaDelta, LoKrDelta)
}


def _factor(full: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
    found = (full,) if full is not None else (a, b)
    return tuple(tensor for tensor in found if tensor is not None)


def multiplied(factor: tuple[Tensor, ...]) -> Tensor:
    """A factor of a LoKr, full or two thin matrices, as one matrix in float32 or wider."""
    first, *rest = (wide(tensor) for tensor in factor)
    return first @ rest[0] if rest else first


def _as_pair(factor: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A factor as a product; a full one is multiplied by the identity on its shorter side."""
    if len(factor) == 2:
        return factor[0], factor[1]
    full = factor[0]
    rows, columns = full.shape
    unit = torch.eye(min(rows, columns), dtype=full.dtype, device=full.device)
    return (unit, full) if rows <= columns else (full, unit)


def delta_of(tensors: Mapping[str, Tensor]) -> Delta:
    """Δ from the tensors of one module by suffix; `ValueError` for unknown or unfit ones."""
    kind = kind_of(tensors)
    own = {suffix.removeprefix(kind.prefix): tensor for suffix, tensor in tensors.items()}
    unknown = own.keys() - {f.name for f in fields(DELTAS[kind])}
    if unknown:
        raise ValueError(f"a tensor {sorted(unknown)[0]} is not supported in a {kind.word}")
    delta = DELTAS[kind](**own)
    _check(delta)
    return delta


def _check(delta: Delta) -> None:
    matrices, kind = delta.matrices(), delta.kind
    # The products of a LoHa are multiplied element by element; those of a LoKr may differ in size.
    elementwise = kind.products if kind is LOHA else ()
    shapes = ", ".join(f"{suffix} {list(t.shape)}" for suffix, t in matrices.items())
    if any(t.ndim != 2 or 0 in t.shape for t in matrices.values()):
        raise ValueError(f"{shapes}: expected matrices")
    for left, right in kind.products:
        if left in matrices and matrices[left].shape[1] != matrices[right].shape[0]:
            raise ValueError(f"{shapes}: the ranks differ")
    if len({(matrices[a].shape[0], matrices[b].shape[1]) for a, b in elementwise}) > 1:
        raise ValueError(f"{shapes}: the sizes differ")
    if delta.dora_scale is not None and delta.dora_scale.numel() not in delta.shape:
        raise ValueError(f"dora_scale {list(delta.dora_scale.shape)} fits no side of {shapes}")


def adapted_weight(weight: Tensor, delta: Delta, strength: float = 1.0) -> Tensor:
    """The weight [out, in] with a Δ on its device built in at a strength, float32 or wider."""
    weight = wide(weight)
    if delta.dora_scale is None:
        return weight + strength * delta.matrix()
    decomposed = weight + delta.matrix()
    dim = 0 if is_of_inputs(delta.dora_scale) else 1
    norm = decomposed.norm(dim=dim, keepdim=True).clamp_min(NORM_FLOOR)
    decomposed = decomposed * (wide(delta.dora_scale).view(norm.shape) / norm)
    return weight + strength * (decomposed - weight)


def is_of_inputs(dora_scale: Tensor) -> bool:
    """Whether magnitudes are those of the inputs [1, in]; other shapes belong to the outputs."""
    return dora_scale.ndim == 2 and dora_scale.shape[0] == 1 and dora_scale.shape[1] != 1


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else (x.double() * factor).to(x.dtype)
